// Causal attention over a paged KV cache: what attention.cpp offers to others.
#pragma once

#include <cstdint>

#include "pool.hpp"

namespace echelon {

struct AttentionShape {
    int64_t num_seqs, block_size, num_kv_heads, group, head_dim, window;
    int64_t q_token_stride, q_head_stride, table_stride;
    float scale;
};

// C: what the caches hold. E4M3 numbers, uint8_t, are those of a head divided by its scale.
template <typename T, typename C = T>
struct AttentionArrays {
    const T* q;
    const C* k_cache;
    const C* v_cache;
    const int32_t* block_table;
    const int32_t* seq_lens;
    const int32_t* cu_seqlens;
    T* out;
    const float* k_scales = nullptr;  // [num_kv_heads]; null: all are 1
    const float* v_scales = nullptr;
};

template <typename T, typename C = T>
void attend(Pool& pool, const AttentionShape& shape, const AttentionArrays<T, C>& arrays);

}  // namespace echelon
