// y = x W^T + b on a CPU. Few rows run at the speed of memory, and a row's bits depend on the row alone.
//
// Each output adds its products in the order of the inputs, in fp32, in one accumulator. Tiles, blocks, chunks and
// threads decide who adds and when, but never in which order. So a row has the same bits alone and among 500 others,
// with 1 thread and with 64.
//
// A weight is packed into panels of 16 outputs: the weights of all 16 for input 0, then for input 1, and so on. In
// bf16, the weights of two inputs lie side by side in 32 bits, which is what the bf16 instructions of AVX-512 multiply.

#include "packed.hpp"
#include "tiles.hpp"
#include "vectors.hpp"

namespace echelon {
namespace {

constexpr int kPanelVectors = kPanel / kLanes;
constexpr int kMostRows = 6;  // of a tile of sums
constexpr int64_t kBlockBytes = 16384;  // of a panel: stays in the first-level cache while tiles of rows pass
constexpr int64_t kBlockRows = 192;

// What differs between the formats. A step multiplies kTogether inputs of each row; its operand for a row is kInputs
// elements of type Input, and its weights of a panel are kPanel * kTogether elements of type Stored.

struct Fp32 {
    using Stored = float;
    using Input = float;
    static constexpr int kTogether = 1;
    static constexpr int kInputs = 1;
    using Weights = Vector;
    static Weights load_weights(const Stored* from) { return load(from); }
    static Vector add(Weights w, const Input* x, Vector sum) { return multiply_add(w, broadcast(x[0]), sum); }
    static void convert(const Stored* x, int64_t num_in, Input* to) { std::copy(x, x + num_in, to); }
};

#if defined(__AVX512BF16__)
struct Bf16 {
    using Stored = uint16_t;
    using Input = uint32_t;  // two inputs
    static constexpr int kTogether = 2;
    static constexpr int kInputs = 1;
    using Weights = __m512bh;
    static Weights load_weights(const Stored* from) { return (__m512bh)load_words(from); }
    static Vector add(Weights w, const Input* x, Vector sum) {
        return _mm512_dpbf16_ps(sum, (__m512bh)_mm512_set1_epi32(static_cast<int>(*x)), w);
    }
    static void convert(const Stored* x, int64_t num_in, Input* to) {
        std::memcpy(to, x, static_cast<size_t>(num_in) * sizeof(Stored));
    }
};
#else
struct Bf16 {
    using Stored = uint16_t;
    using Input = float;
    static constexpr int kTogether = 2;
    static constexpr int kInputs = 2;
    struct Weights {
        Vector even, odd;
    };
    static Weights load_weights(const Stored* from) {
        const Words words = load_words(from);
        return {low_bf16(words), high_bf16(words)};
    }
    static Vector add(Weights w, const Input* x, Vector sum) {
        return multiply_add(w.odd, broadcast(x[1]), multiply_add(w.even, broadcast(x[0]), sum));
    }
    static void convert(const Stored* x, int64_t num_in, Input* to) {
        for (int64_t i = 0; i < num_in; ++i) to[i] = to_float(x[i]);
    }
};
#endif

// Some steps for some rows and panels.
template <typename F>
struct Part {
    const typename F::Input* x;  // rows are x_stride apart
    int64_t x_stride;
    const typename F::Stored* panels;  // panel_stride apart
    int64_t panel_stride;
    int64_t num_steps;
    float* sums;  // rows are sums_stride apart, panels kPanel
    int64_t sums_stride;
    bool is_first;  // the sums begin at zero

    Part at(int64_t row, int64_t panel) const {
        Part part = *this;
        part.x += row * x_stride;
        part.panels += panel * panel_stride;
        part.sums += row * sums_stride + panel * kPanel;
        return part;
    }
};

template <typename F, int kRows, int kPanels>
void add_tile(const Part<F>& part) {
    Vector sums[kRows][kPanels * kPanelVectors];
    for (int row = 0; row < kRows; ++row)
        for (int v = 0; v < kPanels * kPanelVectors; ++v)
            sums[row][v] = part.is_first ? zero() : load(part.sums + row * part.sums_stride + v * kLanes);
    for (int64_t step = 0; step < part.num_steps; ++step) {
        const typename F::Input* x = part.x + step * F::kInputs;
        for (int v = 0; v < kPanels * kPanelVectors; ++v) {
            const auto* panel = part.panels + v / kPanelVectors * part.panel_stride + step * kPanel * F::kTogether;
            const auto weights = F::load_weights(panel + v % kPanelVectors * kLanes * F::kTogether);
            for (int row = 0; row < kRows; ++row) sums[row][v] = F::add(weights, x + row * part.x_stride, sums[row][v]);
        }
    }
    for (int row = 0; row < kRows; ++row)
        for (int v = 0; v < kPanels * kPanelVectors; ++v)
            store(part.sums + row * part.sums_stride + v * kLanes, sums[row][v]);
}

template <typename F, int kRows>
void add_rows(const Part<F>& part, int64_t num_panels) {
    constexpr int kFit = kAccumulators / (kRows * kPanelVectors);
    constexpr int kPanels = kFit >= 4 ? 4 : kFit >= 2 ? 2 : 1;  // 8 are slower: as many places that are read at once
    int64_t panel = 0;
    for (; panel + kPanels <= num_panels; panel += kPanels) add_tile<F, kRows, kPanels>(part.at(0, panel));
    for (; panel < num_panels; ++panel) add_tile<F, kRows, 1>(part.at(0, panel));
}

template <typename F>
void add(const Part<F>& part, int64_t num_rows, int64_t num_panels) {
    for (int64_t row = 0; row < num_rows; row += kMostRows) {
        const Part<F> tile = part.at(row, 0);
        switch (std::min<int64_t>(kMostRows, num_rows - row)) {
            case 1: add_rows<F, 1>(tile, num_panels); break;
            case 2: add_rows<F, 2>(tile, num_panels); break;
            case 3: add_rows<F, 3>(tile, num_panels); break;
            case 4: add_rows<F, 4>(tile, num_panels); break;
            case 5: add_rows<F, 5>(tile, num_panels); break;
            default: add_rows<F, kMostRows>(tile, num_panels);
        }
    }
}

template <typename F>
class Product {
  public:
    using Stored = typename F::Stored;
    using Input = typename F::Input;

    Product(const Stored* packed, int64_t num_out, int64_t num_in)
        : packed_(packed), num_out_(num_out), num_in_(num_in), num_steps_(padded_inputs(num_in) / F::kTogether) {}

    void run(Pool& pool, const Stored* x, int64_t num_rows, int64_t x_stride, const Stored* bias, Stored* y) const {
        const InputRows<Input> inputs(pool, num_rows, num_steps_ * F::kInputs, [&](int64_t row, Input* to) {
            F::convert(x + row * x_stride, num_in_, to);
        });
        const int64_t num_panels = padded_panels(num_out_), group = panels_of_chunk(num_panels, pool.num_threads());
        const int64_t num_row_blocks = divide_up(num_rows, kBlockRows);
        pool.run(divide_up(num_panels, group) * num_row_blocks, [&](int64_t chunk) {
            const int64_t first_panel = chunk / num_row_blocks * group, first_row = chunk % num_row_blocks * kBlockRows;
            const int64_t panels = std::min(group, num_panels - first_panel);
            const int64_t rows = std::min(kBlockRows, num_rows - first_row);
            thread_local float sums[kBlockRows * kMostPanelsOfChunk * kPanel];
            add_chunk(inputs.at(first_row), inputs.stride(), rows, first_panel, panels, sums);
            round_chunk(sums, rows, first_panel, panels, bias, y + first_row * num_out_);
        });
    }

  private:
    void add_chunk(const Input* x, int64_t x_stride, int64_t rows, int64_t first_panel, int64_t panels,
                   float* sums) const {
        // The rows of one tile read each weight once, so blocks would gain nothing.
        const int64_t block = rows <= kMostRows ? num_steps_ : kBlockBytes / (kPanel * F::kTogether * sizeof(Stored));
        const int64_t panel_stride = num_steps_ * F::kTogether * kPanel;
        for (int64_t step = 0; step < num_steps_; step += block) {
            const Stored* panel = packed_ + first_panel * panel_stride + step * F::kTogether * kPanel;
            add<F>({x + step * F::kInputs, x_stride, panel, panel_stride, std::min(block, num_steps_ - step), sums,
                    panels * kPanel, step == 0},
                   rows, panels);
        }
    }

    void round_chunk(float* sums, int64_t rows, int64_t first_panel, int64_t panels, const Stored* bias,
                     Stored* y) const {
        const int64_t first_out = first_panel * kPanel;
        const int64_t num_outs = std::min(panels * kPanel, num_out_ - first_out);
        for (int64_t row = 0; row < rows; ++row, sums += panels * kPanel)
            put_row(y + row * num_out_ + first_out, sums, bias ? bias + first_out : nullptr, num_outs);
    }

    const Stored* packed_;
    int64_t num_out_, num_in_, num_steps_;
};

template <typename F>
void pack(Pool& pool, const typename F::Stored* weight, int64_t num_out, int64_t num_in, int64_t stride,
          typename F::Stored* packed) {
    using Stored = typename F::Stored;
    constexpr int64_t kBlockSteps = 64;  // of a panel: what is written stays in the first-level cache
    const int64_t num_steps = padded_inputs(num_in) / F::kTogether;
    pool.run(padded_panels(num_out), [&](int64_t panel) {
        Stored* const to = packed + panel * num_steps * F::kTogether * kPanel;
        const int64_t num_outs = std::clamp<int64_t>(num_out - panel * kPanel, 0, kPanel);
        std::fill(to, to + num_steps * F::kTogether * kPanel, Stored{0});
        for (int64_t block = 0; block < num_steps; block += kBlockSteps)
            for (int64_t out = 0; out < num_outs; ++out) {
                const Stored* const from = weight + (panel * kPanel + out) * stride;
                const int64_t end = std::min(num_steps, block + kBlockSteps);
                for (int64_t step = block; step < end; ++step)
                    for (int64_t i = 0; i < F::kTogether && step * F::kTogether + i < num_in; ++i)
                        to[(step * kPanel + out) * F::kTogether + i] = from[step * F::kTogether + i];
            }
    });
    const int64_t num_elements = padded_panels(num_out) * num_steps * F::kTogether * kPanel;
    use_huge_pages(packed, num_elements * static_cast<int64_t>(sizeof(Stored)));
}

}  // namespace
}  // namespace echelon

using echelon::Pool;

extern "C" {

Pool* echelon_new_pool(int num_threads) { return new Pool(num_threads); }

#define ECHELON_LINEAR(name, Format, Product)                                                                   \
    void echelon_pack_##name(Pool* pool, const Format::Stored* weight, int64_t num_out, int64_t num_in,         \
                             int64_t stride, Format::Stored* packed) {                                          \
        echelon::pack<Format>(*pool, weight, num_out, num_in, stride, packed);                                  \
    }                                                                                                           \
    void echelon_linear_##name(Pool* pool, const Format::Stored* x, int64_t num_rows, int64_t x_stride,         \
                               const Format::Stored* packed, int64_t num_out, int64_t num_in,                   \
                               const Format::Stored* bias, Format::Stored* y) {                                 \
        Product(packed, num_out, num_in).run(*pool, x, num_rows, x_stride, bias, y);                            \
    }

ECHELON_LINEAR(float32, echelon::Fp32, echelon::Product<echelon::Fp32>)
#if defined(__AMX_BF16__)
ECHELON_LINEAR(bfloat16, echelon::Bf16, echelon::TiledProduct)
#else
ECHELON_LINEAR(bfloat16, echelon::Bf16, echelon::Product<echelon::Bf16>)
#endif

}  // extern "C"
