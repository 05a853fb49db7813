"""The filter with which a GPU test looks for operators of torch on the hot path."""

import pytest
import torch
from torch.nn import functional as F

from tests.helpers.launched import foreign_kernels, launched_by, our_kernels, replaced_operators

VOCAB_SIZE = 1000


@pytest.mark.parametrize(
    "name",
    [
        "void at::native::(anonymous namespace)::softmax_warp_forward<float, float, float, 10, false>(float*, int)",
        "void at::native::(anonymous namespace)::cunn_SoftMaxForward<4, float, float, float>(float*, float const*)",
        "void pytorch_flash::flash_fwd_splitkv_kernel<Flash_fwd_kernel_traits<128>>(pytorch_flash::Flash_fwd_params)",
        "fmha_cutlassF_bf16_aligned_64x128_rf_sm80(PyTorchMemEffAttention::AttentionKernel)",
        "void at::native::(anonymous namespace)::vectorized_layer_norm_kernel<float, float>(int, float const*)",
        "void at::native::radixSortKVInPlace<2, -1, 32, 4, float, long, unsigned int>(float*)",
        "void at_cuda_detail::cub::DeviceRadixSortOnesweepKernel<float>(unsigned int*)",
        "void at::native::sbtopk::gatherTopK<float, unsigned int, 2, false>(float const*)",
        "void at::native::(anonymous namespace)::sampleMultinomialOnce<float, float>(long*, long)",
    ],
)
def test_torch_kernels_that_ours_replace_are_found(name: str) -> None:
    assert foreign_kernels([name]) == [name]


def test_ours_and_harmless_kernels_pass() -> None:
    harmless = [
        "Memcpy HtoD (Pageable -> Device)",
        "Memset (Device)",
        "void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<float>>(int, float)",
        "void at::native::index_elementwise_kernel<128, 4, at::native::gpu_index_kernel>(long)",
        "void at::native::(anonymous namespace)::CatArrayBatchedCopy<at::native::(anonymous namespace)::Opaque<4u>>()",
        "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize64x64x64_cublas",
        "nvjet_tst_64x8_64x16_1x4_h_bz_TNT",
        "void gemv2T_kernel_val<int, int, float, float, float>(float)",
    ]
    assert foreign_kernels([*harmless, *our_kernels("layers.rms_norm", "kv.block_copy")]) == []


@pytest.mark.parametrize(
    ("work", "found"),
    [
        (lambda x: F.scaled_dot_product_attention(x, x, x), "scaled_dot_product"),
        (lambda x: F.rms_norm(x, x.shape[-1:]), "rms_norm"),
        (lambda x: F.silu(x), "aten::silu"),
        (lambda x: x.argmax(-1), "aten::argmax"),
        (lambda x: x.max(dim=-1), "aten::max"),
        (lambda x: x.sort(), "aten::sort"),
        (lambda x: x.isfinite().all(), "aten::all"),
        (lambda x: x.new_empty(x.shape).exponential_(), "aten::exponential_"),
    ],
)
def test_torch_operators_that_ours_replace_are_found(work, found: str) -> None:  # type: ignore[no-untyped-def]
    x = torch.randn(1, 2, 3, VOCAB_SIZE)
    operators = replaced_operators(launched_by(lambda: work(x)).operators, vocab_size=VOCAB_SIZE)
    assert any(found in operator for operator in operators)


def test_products_indexing_and_small_reductions_pass() -> None:
    x, weight, rows = torch.randn(4, 8), torch.randn(VOCAB_SIZE, 8), torch.tensor([2, 0])

    def work() -> None:
        logits = F.linear(x[rows], weight)
        logits.clone().add_(1).masked_fill_(logits < 0, 0.0)
        rows.max()
        torch.stack([rows, rows]).max(dim=0)
        F.embedding(rows, weight)

    assert replaced_operators(launched_by(work).operators, vocab_size=VOCAB_SIZE) == []
