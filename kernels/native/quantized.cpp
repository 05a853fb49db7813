// y = x W^T + b for weights of 4 or 8 bits on a CPU, which few rows read at the speed of memory.
//
// A weight is packed into panels of 16 outputs, as in linear.cpp. Codes of 4 bits index a table of 16 values: -8 to 7,
// or those of MXFP4. Codes of 8 bits are the numbers themselves. The products of a group of inputs are added in fp32 in
// the order of the inputs (in pairs, where the CPU multiplies bf16 so), multiplied by the group's scale, and added to
// the sum, so a row's bits depend on the row alone. A zero point is subtracted from the codes of a group: times the sum
// of the group's inputs, from their products.

#include "quantized.hpp"
#include "vectors.hpp"

extern "C" {  // of linear.cpp
void echelon_linear_float32(echelon::Pool* pool, const float* x, int64_t num_rows, int64_t x_stride,
                            const float* packed, int64_t num_out, int64_t num_in, const float* bias, float* y);
void echelon_linear_bfloat16(echelon::Pool* pool, const uint16_t* x, int64_t num_rows, int64_t x_stride,
                             const uint16_t* packed, int64_t num_out, int64_t num_in, const uint16_t* bias,
                             uint16_t* y);
}

namespace echelon {
namespace {

constexpr int kPanelVectors = kPanel / kLanes;
constexpr int kMostRows = 8;  // of a tile of sums
constexpr int64_t kRowsAtOnce = 256;  // of a direct product: their sums stay in the caches. Not measured.
constexpr int64_t kExpandedElements = 1 << 20;  // at a time: they stay in the second-level caches. Not measured.

#if defined(__AVX512F__)
inline Vector look_up(const Vector* table, Words indices) { return _mm512_permutexvar_ps(indices, table[0]); }
inline Words shifted(Words w, int bits) { return _mm512_srl_epi32(w, _mm_cvtsi32_si128(bits)); }
inline Words bits_of(Vector v) { return _mm512_castps_si512(v); }
inline Words add_words(Words a, Words b) { return _mm512_add_epi32(a, b); }
inline Words words_of(int word) { return _mm512_set1_epi32(word); }
inline Words both(Words a, Words b) { return _mm512_and_si512(a, b); }
inline Words either(Words a, Words b) { return _mm512_or_si512(a, b); }
inline void store_words(uint16_t* to, Words w) { _mm512_storeu_si512(to, w); }
inline Vector widen_int8(const uint8_t* from) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
}
#else
inline Vector look_up(const Vector* table, Words indices) {  // bit 3 chooses the half of the table
    const Vector low = _mm256_permutevar8x32_ps(table[0], indices), high = _mm256_permutevar8x32_ps(table[1], indices);
    return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(indices, 28)));
}
inline Words shifted(Words w, int bits) { return _mm256_srl_epi32(w, _mm_cvtsi32_si128(bits)); }
inline Words bits_of(Vector v) { return _mm256_castps_si256(v); }
inline Words add_words(Words a, Words b) { return _mm256_add_epi32(a, b); }
inline Words words_of(int word) { return _mm256_set1_epi32(word); }
inline Words both(Words a, Words b) { return _mm256_and_si256(a, b); }
inline Words either(Words a, Words b) { return _mm256_or_si256(a, b); }
inline void store_words(uint16_t* to, Words w) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), w); }
inline Vector widen_int8(const uint8_t* from) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))));
}
#endif

// Blocks of 8 inputs: a word of 32 bits for each output. Its lower half holds the even inputs, its upper half the odd.
class Codes4 {
  public:
    static constexpr int kBlockInputs = 8;
    static constexpr int kBlockBytes = 64;

    explicit Codes4(const Weight& weight) {
        for (int v = 0; v < kPanelVectors; ++v) table_[v] = load(weight.table + v * kLanes);
    }
    Vector values(const uint8_t* block, int v, int input) const {
        const Words words = load_words(reinterpret_cast<const uint16_t*>(block + v * kLanes * 4));
        return look_up(table_, shifted(words, input % 2 * 16 + input / 2 * 4));
    }
    static void pack(const uint8_t* from, int64_t stride, int64_t num_outs, int64_t input, int64_t num_in,
                     uint8_t* block) {
        for (int64_t out = 0; out < num_outs; ++out)
            for (int64_t i = 0; i < kBlockInputs && input + i < num_in; ++i) {
                const int code = from[out * stride + (input + i) / 2] >> ((input + i) % 2 * 4) & 15;
                block[out * 4 + i % 2 * 2 + i / 4] |= static_cast<uint8_t>(code << (i / 2 % 2 * 4));
            }
    }

  private:
    Vector table_[kPanelVectors];
};

// Blocks of one input: a byte for each output.
class Codes8 {
  public:
    static constexpr int kBlockInputs = 1;
    static constexpr int kBlockBytes = kPanel;

    explicit Codes8(const Weight&) {}
    Vector values(const uint8_t* block, int v, int) const { return widen_int8(block + v * kLanes); }
    static void pack(const uint8_t* from, int64_t stride, int64_t num_outs, int64_t input, int64_t num_in,
                     uint8_t* block) {
        for (int64_t out = 0; out < num_outs && input < num_in; ++out) block[out] = from[out * stride + input];
    }
};

// Products in fp32, one input at a time.
template <typename Codes>
class Floats : public Codes {
  public:
    using Input = float;
    static constexpr int kTogether = 1;

    using Codes::Codes;
    Vector weights(const uint8_t* block, int v, int step) const { return Codes::values(block, v, step); }
    static Vector add(Vector weights, const Input* x, Vector sum) { return multiply_add(weights, broadcast(*x), sum); }
    template <typename T>
    static void convert(const T* x, int64_t num_in, Input* to) {
        for (int64_t i = 0; i < num_in; ++i) to[i] = to_float(x[i]);
    }
};

#if defined(__AVX512BF16__)
// Products of codes of 4 bits with bf16 inputs, two at a time. bf16 has all values of the table.
class Pairs4 : public Codes4 {
  public:
    using Input = uint32_t;  // two inputs
    static constexpr int kTogether = 2;

    explicit Pairs4(const Weight& weight) : Codes4(weight) {
        uint16_t values[32];  // the table twice: an index has 5 bits, of which the upper one belongs to another code
        for (int i = 0; i < 32; ++i) put(values + i, weight.table[i % 16]);
        values_ = load_words(values);
    }
    __m512bh weights(const uint8_t* block, int, int step) const {
        const Words words = load_words(reinterpret_cast<const uint16_t*>(block));
        return (__m512bh)_mm512_permutexvar_epi16(_mm512_srl_epi16(words, _mm_cvtsi32_si128(4 * step)), values_);
    }
    static Vector add(__m512bh weights, const Input* x, Vector sum) {
        return _mm512_dpbf16_ps(sum, (__m512bh)_mm512_set1_epi32(static_cast<int>(*x)), weights);
    }
    static void convert(const uint16_t* x, int64_t num_in, Input* to) {
        std::memcpy(to, x, static_cast<size_t>(num_in) * sizeof(uint16_t));
    }

  private:
    Words values_;
};
#endif

// How inputs of type T are multiplied.
template <typename Codes, typename T>
struct Products {
    using Format = Floats<Codes>;
};
#if defined(__AVX512BF16__)
template <>
struct Products<Codes4, uint16_t> {
    using Format = Pairs4;
};
#endif

// Some blocks of a group of inputs, for some rows and panels.
template <typename Input>
struct Part {
    const Input* x;  // rows are x_stride apart
    int64_t x_stride;
    const uint8_t* codes;  // panels are panel_bytes apart
    int64_t panel_bytes;
    int64_t num_blocks;
    const float* scales;  // panels are scale_stride apart
    const float* zeros;   // likewise; null: none
    int64_t scale_stride;
    const float* totals;  // of a row's inputs in this group; rows are total_stride apart
    int64_t total_stride;
    float* sums;  // rows are sums_stride apart, panels kPanel
    int64_t sums_stride;

    Part at(int64_t row, int64_t panel) const {
        Part part = *this;
        part.x += row * x_stride;
        part.codes += panel * panel_bytes;
        part.scales += panel * scale_stride;
        if (zeros) {
            part.zeros += panel * scale_stride;
            part.totals += row * total_stride;
        }
        part.sums += row * sums_stride + panel * kPanel;
        return part;
    }
};

template <typename F, int kRows, int kPanels>
void add_tile(const F& format, const Part<typename F::Input>& part) {
    constexpr int kSteps = F::kBlockInputs / F::kTogether;
    Vector sums[kRows][kPanels * kPanelVectors];
    for (auto& of_row : sums)
        for (Vector& sum : of_row) sum = zero();
    const typename F::Input* x = part.x;
    const uint8_t* codes = part.codes;
    for (int64_t block = 0; block < part.num_blocks; ++block, x += kSteps, codes += F::kBlockBytes)
#pragma GCC unroll 8
        for (int step = 0; step < kSteps; ++step)
            for (int v = 0; v < kPanels * kPanelVectors; ++v) {
                const uint8_t* const panel = codes + v / kPanelVectors * part.panel_bytes;
                const auto weights = format.weights(panel, v % kPanelVectors, step);
                for (int row = 0; row < kRows; ++row)
                    sums[row][v] = F::add(weights, x + row * part.x_stride + step, sums[row][v]);
            }
    for (int v = 0; v < kPanels * kPanelVectors; ++v) {
        const int64_t place = v / kPanelVectors * part.scale_stride + v % kPanelVectors * kLanes;
        const Vector scale = load(part.scales + place);
        const Vector zero_point = part.zeros ? load(part.zeros + place) : zero();
        for (int row = 0; row < kRows; ++row) {
            float* const sum = part.sums + row * part.sums_stride + v * kLanes;
            if (part.zeros)
                sums[row][v] = subtract(sums[row][v], multiply(zero_point, broadcast(part.totals[row * part.total_stride])));
            store(sum, multiply_add(sums[row][v], scale, load(sum)));
        }
    }
}

template <typename F, int kRows>
void add_rows(const F& format, const Part<typename F::Input>& part, int64_t num_panels) {
    constexpr int kPanels = kRows * kPanelVectors <= 4 ? 4 : kRows * kPanelVectors <= 8 ? 2 : 1;
    for (int64_t panel = 0; panel < num_panels; panel += kPanels)
        add_tile<F, kRows, kPanels>(format, part.at(0, panel));
}

template <typename F>
void add(const F& format, const Part<typename F::Input>& part, int64_t num_rows, int64_t num_panels) {
    for (int64_t row = 0; row < num_rows; row += kMostRows) {
        const auto tile = part.at(row, 0);
        switch (std::min<int64_t>(kMostRows, num_rows - row)) {
            case 1: add_rows<F, 1>(format, tile, num_panels); break;
            case 2: add_rows<F, 2>(format, tile, num_panels); break;
            case 3: add_rows<F, 3>(format, tile, num_panels); break;
            case 4: add_rows<F, 4>(format, tile, num_panels); break;
            case 5: add_rows<F, 5>(format, tile, num_panels); break;
            case 6: add_rows<F, 6>(format, tile, num_panels); break;
            case 7: add_rows<F, 7>(format, tile, num_panels); break;
            default: add_rows<F, kMostRows>(format, tile, num_panels);
        }
    }
}

template <typename F>
int64_t panel_bytes(const Weight& weight) {
    return padded_inputs(weight.num_in) / F::kBlockInputs * F::kBlockBytes;
}

// The sums of each row's inputs in each group, [rows][groups], added in order.
template <typename T>
std::unique_ptr<float[]> group_totals(const T* x, int64_t num_rows, int64_t x_stride, const Weight& weight) {
    const int64_t num_groups = weight.num_groups();
    std::unique_ptr<float[]> totals(new float[static_cast<size_t>(num_rows * num_groups)]());
    for (int64_t row = 0; row < num_rows; ++row)
        for (int64_t input = 0; input < weight.num_in; ++input)
            totals[row * num_groups + input / weight.group_size] += to_float(x[row * x_stride + input]);
    return totals;
}

// T: of x, bias and y.
template <typename F, typename T>
void run_product(Pool& pool, const Weight& weight, const T* x, int64_t num_rows, int64_t x_stride, const T* bias, T* y) {
    using Input = typename F::Input;
    const F format(weight);
    const int64_t padded_in = padded_inputs(weight.num_in), num_groups = weight.num_groups();
    const InputRows<Input> inputs(pool, num_rows, padded_in / F::kTogether, [&](int64_t row, Input* to) {
        F::convert(x + row * x_stride, weight.num_in, to);
    });
    const auto totals = weight.zeros ? group_totals(x, num_rows, x_stride, weight) : nullptr;
    const int64_t num_panels = padded_panels(weight.num_out);
    const int64_t most = panels_of_chunk(num_panels, pool.num_threads()), bytes = panel_bytes<F>(weight);
    pool.run(divide_up(num_panels, most), [&](int64_t chunk) {
        const int64_t first = chunk * most, panels = std::min(most, num_panels - first);
        const std::unique_ptr<float[]> sums(new float[static_cast<size_t>(num_rows * panels * kPanel)]());
        for (int64_t some = 0; some < panels; some += kPanelsTogether)  // each is read from end to end
            for (int64_t group = 0; group < num_groups; ++group) {
                const int64_t panel = first + some, input = group * weight.group_size;
                const int64_t num_blocks = std::min(weight.group_size, padded_in - input) / F::kBlockInputs;
                const uint8_t* const codes = weight.codes + panel * bytes + input / F::kBlockInputs * F::kBlockBytes;
                const int64_t scale = (panel * num_groups + group) * kPanel;
                add<F>(format,
                       {inputs.at(0) + input / F::kTogether, inputs.stride(), codes, bytes, num_blocks,
                        weight.scales + scale, weight.zeros ? weight.zeros + scale : nullptr, num_groups * kPanel,
                        totals.get() + (totals ? group : 0), num_groups, sums.get() + some * kPanel, panels * kPanel},
                       num_rows, kPanelsTogether);
            }
        const int64_t first_out = first * kPanel, num_outs = std::min(panels * kPanel, weight.num_out - first_out);
        for (int64_t row = 0; row < num_rows && num_outs > 0; ++row)
            put_row(y + row * weight.num_out + first_out, sums.get() + row * panels * kPanel,
                    bias ? bias + first_out : nullptr, num_outs);
    });
}

// Two inputs of some outputs, as linear.cpp stores them.
inline void put_inputs(float* to, int v, Vector even, Vector odd) {
    store(to + v * kLanes, even);
    store(to + kPanel + v * kLanes, odd);
}
inline Words rounded_to_bf16(Vector x) {  // in the upper halves; ties to even
    const Words bits = bits_of(x);
    return add_words(bits, add_words(words_of(0x7fff), both(shifted(bits, 16), words_of(1))));
}
inline void put_inputs(uint16_t* to, int v, Vector even, Vector odd) {
    const Words upper = both(rounded_to_bf16(odd), words_of(static_cast<int>(0xffff0000u)));
    store_words(to + 2 * v * kLanes, either(shifted(rounded_to_bf16(even), 16), upper));
}

// Some panels as a dense weight in the layout of linear.cpp.
template <typename Codes, typename T>
void expand(Pool& pool, const Weight& weight, int64_t first_panel, int64_t num_panels, T* to) {
    constexpr int kInputs = std::max(2, Codes::kBlockInputs);  // a group has a multiple of them
    const Codes codes(weight);
    const int64_t padded_in = padded_inputs(weight.num_in), num_groups = weight.num_groups();
    const auto value = [&](const uint8_t* block, int v, int input, Vector zero_point, Vector scale) {
        const uint8_t* const from = block + input / Codes::kBlockInputs * Codes::kBlockBytes;
        return multiply(subtract(codes.values(from, v, input % Codes::kBlockInputs), zero_point), scale);
    };
    pool.run(num_panels, [&](int64_t index) {
        const uint8_t* block = weight.codes + (first_panel + index) * panel_bytes<Codes>(weight);
        const int64_t first_scale = (first_panel + index) * num_groups * kPanel;
        T* dense = to + index * padded_in * kPanel;
        for (int64_t input = 0; input < padded_in; input += kInputs) {
            for (int v = 0; v < kPanelVectors; ++v) {
                const int64_t place = first_scale + input / weight.group_size * kPanel + v * kLanes;
                const Vector scale = load(weight.scales + place);
                const Vector zero_point = weight.zeros ? load(weight.zeros + place) : zero();
#pragma GCC unroll 4
                for (int i = 0; i < kInputs; i += 2)
                    put_inputs(dense + i * kPanel, v, value(block, v, i, zero_point, scale),
                               value(block, v, i + 1, zero_point, scale));
            }
            block += kInputs / Codes::kBlockInputs * Codes::kBlockBytes;
            dense += kInputs * kPanel;
        }
    });
}

inline void multiply_dense(Pool& pool, const float* x, int64_t num_rows, int64_t x_stride, const float* packed,
                           int64_t num_out, int64_t num_in, const float* bias, float* y) {
    echelon_linear_float32(&pool, x, num_rows, x_stride, packed, num_out, num_in, bias, y);
}
inline void multiply_dense(Pool& pool, const uint16_t* x, int64_t num_rows, int64_t x_stride, const uint16_t* packed,
                           int64_t num_out, int64_t num_in, const uint16_t* bias, uint16_t* y) {
    echelon_linear_bfloat16(&pool, x, num_rows, x_stride, packed, num_out, num_in, bias, y);
}

// A part of the weight at a time.
template <typename Codes, typename T>
void expand_and_multiply(Pool& pool, const Weight& weight, const T* x, int64_t num_rows, int64_t x_stride,
                         const T* bias, T* y) {
    const int64_t panel_elements = padded_inputs(weight.num_in) * kPanel, num_panels = padded_panels(weight.num_out);
    const int64_t fitting = kExpandedElements / panel_elements / kPanelsTogether * kPanelsTogether;
    const int64_t at_once = std::clamp<int64_t>(fitting, kPanelsTogether, num_panels);
    const std::unique_ptr<T[]> dense(new T[static_cast<size_t>(at_once * panel_elements)]);
    const std::unique_ptr<T[]> part(new T[static_cast<size_t>(num_rows * at_once * kPanel)]);
    for (int64_t panel = 0; panel < num_panels; panel += at_once) {
        const int64_t first = panel * kPanel, num_outs = std::min(at_once * kPanel, weight.num_out - first);
        expand<Codes, T>(pool, weight, panel, std::min(at_once, num_panels - panel), dense.get());
        multiply_dense(pool, x, num_rows, x_stride, dense.get(), num_outs, weight.num_in, bias ? bias + first : nullptr,
                       part.get());
        for (int64_t row = 0; row < num_rows; ++row)
            std::copy_n(part.get() + row * num_outs, num_outs, y + row * weight.num_out + first);
    }
}

template <typename Codes, typename T>
void multiply_rows(Pool& pool, const Weight& weight, const T* x, int64_t num_rows, int64_t x_stride, const T* bias,
                   T* y) {
    if (num_rows > weight.most_direct_rows) {
        expand_and_multiply<Codes, T>(pool, weight, x, num_rows, x_stride, bias, y);
        return;
    }
    for (int64_t row = 0; row < num_rows; row += kRowsAtOnce)
        run_product<typename Products<Codes, T>::Format, T>(pool, weight, x + row * x_stride,
                                                            std::min(kRowsAtOnce, num_rows - row), x_stride, bias,
                                                            y + row * weight.num_out);
}

template <typename Codes>
void pack(Pool& pool, const uint8_t* codes, int64_t stride, int64_t num_out, int64_t num_in, uint8_t* packed) {
    const int64_t num_blocks = padded_inputs(num_in) / Codes::kBlockInputs;
    pool.run(padded_panels(num_out), [&](int64_t panel) {
        uint8_t* const to = packed + panel * num_blocks * Codes::kBlockBytes;
        std::fill_n(to, num_blocks * Codes::kBlockBytes, uint8_t{0});
        const int64_t num_outs = std::clamp<int64_t>(num_out - panel * kPanel, 0, kPanel);
        for (int64_t block = 0; block < num_blocks; ++block)
            Codes::pack(codes + panel * kPanel * stride, stride, num_outs, block * Codes::kBlockInputs, num_in,
                        to + block * Codes::kBlockBytes);
    });
    use_huge_pages(packed, padded_panels(num_out) * num_blocks * Codes::kBlockBytes);
}

}  // namespace
}  // namespace echelon

using echelon::Pool;

extern "C" {

#define ECHELON_PACK(bits)                                                                                       \
    void echelon_pack_codes##bits(Pool* pool, const uint8_t* codes, int64_t stride, int64_t num_out,             \
                                  int64_t num_in, uint8_t* packed) {                                             \
        echelon::pack<echelon::Codes##bits>(*pool, codes, stride, num_out, num_in, packed);                      \
    }

// Takes its arguments as the products of linear.cpp do, so that others can call either.
#define ECHELON_QUANTIZED(bits, name, T)                                                                          \
    void echelon_linear_codes##bits##_##name(Pool* pool, const T* x, int64_t num_rows, int64_t x_stride,          \
                                             const echelon::PackedCodes* packed, int64_t num_out, int64_t num_in, \
                                             const T* bias, T* y) {                                               \
        const echelon::Weight weight{*packed, num_out, num_in};                                                   \
        echelon::multiply_rows<echelon::Codes##bits, T>(*pool, weight, x, num_rows, x_stride, bias, y);           \
    }

ECHELON_PACK(4)
ECHELON_PACK(8)
ECHELON_QUANTIZED(4, float32, float)
ECHELON_QUANTIZED(4, bfloat16, uint16_t)
ECHELON_QUANTIZED(8, float32, float)
ECHELON_QUANTIZED(8, bfloat16, uint16_t)

}  // extern "C"
