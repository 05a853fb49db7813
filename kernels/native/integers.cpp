// y = x W^T + b for the weights of quantized.cpp, with inputs that are rounded to 8 bits too, for models whose results
// need not be exact: drafts.
//
// A group of up to 128 inputs of a row becomes int8, with a scale of its own, as llama.cpp rounds them to Q8_0. AVX-512
// VNNI then adds 64 products of bytes in one instruction, where bf16 takes 32 and must look up each weight. So 1 to 8
// rows take the time in which the weight is read. Sums of a group are whole numbers, exact in any order. They are scaled
// and added in fp32 in the order of the groups, so a row's bits depend on the row alone.

#include <limits>
#include <numeric>

#include "quantized.hpp"
#include "vectors.hpp"

extern "C" {  // of quantized.cpp
#define ECHELON_CODES(bits, name, T)                                                                              \
    void echelon_linear_codes##bits##_##name(echelon::Pool* pool, const T* x, int64_t num_rows, int64_t x_stride, \
                                             const echelon::PackedCodes* packed, int64_t num_out, int64_t num_in, \
                                             const T* bias, T* y);
ECHELON_CODES(4, float32, float)
ECHELON_CODES(4, bfloat16, uint16_t)
ECHELON_CODES(8, float32, float)
ECHELON_CODES(8, bfloat16, uint16_t)
}

#if defined(__AVX512VNNI__)
namespace echelon {
namespace {

constexpr int kBlockBytes = 64;  // of a panel's codes
constexpr int kMostRows = 8;     // of a tile of sums
constexpr int64_t kMostInputs = 128;  // that share a scale
constexpr int64_t kBytesAhead = 1024;  // of a panel, asked for before they are needed

// Codes as unsigned bytes: words of 4 inputs for each of 16 outputs. A byte is the weight times kFactor, plus kOffset.

class Bytes4 {
  public:
    static constexpr int kBlockWords = 2;
    static constexpr int kOffset = 16;
    static constexpr float kFactor = 2.0f;  // MXFP4 has halves

    explicit Bytes4(const Weight& weight) {
        alignas(16) uint8_t bytes[16];
        for (int code = 0; code < 16; ++code)
            bytes[code] = static_cast<uint8_t>(kFactor * weight.table[code] + kOffset);
        table_ = _mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i*>(bytes)));
    }
    void unpack(const uint8_t* block, Words* words) const {
        const Words codes = _mm512_loadu_si512(block), nibble = _mm512_set1_epi8(15);
        words[0] = _mm512_shuffle_epi8(table_, _mm512_and_si512(codes, nibble));
        words[1] = _mm512_shuffle_epi8(table_, _mm512_and_si512(_mm512_srli_epi16(codes, 4), nibble));
    }
    // Of 16 inputs: those of the words of two blocks.
    static __m128i order() { return _mm_setr_epi8(0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15); }

  private:
    Words table_;
};

class Bytes8 {
  public:
    static constexpr int kBlockWords = 1;
    static constexpr int kOffset = 128;
    static constexpr float kFactor = 1.0f;

    explicit Bytes8(const Weight&) {}
    void unpack(const uint8_t* block, Words* words) const {  // 4 rows of 16 bytes become 16 words
        const Words rows = _mm512_loadu_si512(block);
        const Words quarters = _mm512_permutexvar_epi32(
            _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15), rows);
        const Words columns = _mm512_broadcast_i32x4(
            _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
        words[0] = _mm512_xor_si512(_mm512_shuffle_epi8(quarters, columns), _mm512_set1_epi8(-128));
    }
    static __m128i order() { return _mm_setr_epi8(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15); }
};

// Rows of inputs in int8, four in a word, in the order in which a weight's words hold them.
template <typename F>
class RoundedRows {
  public:
    template <typename T>
    RoundedRows(Pool& pool, const T* x, int64_t num_rows, int64_t x_stride, const Weight& weight)
        : group_size_(std::gcd(std::gcd(weight.group_size, padded_inputs(weight.num_in)), kMostInputs)),
          num_groups_(padded_inputs(weight.num_in) / group_size_),
          scales_(new float[static_cast<size_t>(num_rows * num_groups_)]),
          starts_(new int32_t[static_cast<size_t>(num_rows * num_groups_)]),
          words_(pool, num_rows, padded_inputs(weight.num_in) / 4, [&](int64_t row, int32_t* to) {
              round_row(x + row * x_stride, weight.num_in, row, reinterpret_cast<int8_t*>(to));
          }) {}

    int64_t group_size() const { return group_size_; }
    int64_t num_groups() const { return num_groups_; }
    const int32_t* words(int64_t row, int64_t group) const { return words_.at(row) + group * group_size_ / 4; }
    int64_t stride() const { return words_.stride(); }
    float scale(int64_t row, int64_t group) const { return scales_[row * num_groups_ + group]; }
    // What takes the weights' offset from a sum of products.
    int32_t start(int64_t row, int64_t group) const { return starts_[row * num_groups_ + group]; }

  private:
    template <typename T>
    void round_row(const T* x, int64_t num_in, int64_t row, int8_t* to) const {
        const std::unique_ptr<float[]> wide(new float[static_cast<size_t>(num_groups_ * group_size_)]());
        for (int64_t i = 0; i < num_in; ++i) wide[i] = to_float(x[i]);
        for (int64_t group = 0; group < num_groups_; ++group)
            round_group(wide.get() + group * group_size_, row * num_groups_ + group, to + group * group_size_);
    }

    // The input of the largest magnitude becomes 127 or -127, others the nearest number, ties the even one.
    void round_group(const float* x, int64_t index, int8_t* to) const {
        const Words magnitude = _mm512_set1_epi32(0x7fffffff);
        Words most = _mm512_setzero_si512(), sum = most;
        for (int64_t i = 0; i < group_size_; i += kLanes)  // bits of numbers are ordered like them, NaN last
            most = _mm512_max_epu32(most, _mm512_and_si512(_mm512_castps_si512(load(x + i)), magnitude));
        const uint32_t bits = _mm512_reduce_max_epu32(most);
        float largest;
        std::memcpy(&largest, &bits, sizeof largest);
        const bool is_finite = bits < 0x7f800000u;
        const Vector inverse = broadcast(is_finite && largest > 0 ? 127.0f / largest : 0.0f);
        for (int64_t i = 0; i < group_size_; i += kLanes) {
            const Words codes = _mm512_cvtps_epi32(multiply(load(x + i), inverse));
            sum = _mm512_add_epi32(sum, codes);
            _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i),
                             _mm_shuffle_epi8(_mm512_cvtsepi32_epi8(codes), F::order()));
        }
        scales_[index] = (is_finite ? largest : std::numeric_limits<float>::quiet_NaN()) / 127.0f / F::kFactor;
        starts_[index] = -F::kOffset * _mm512_reduce_add_epi32(sum);
    }

    int64_t group_size_, num_groups_;
    std::unique_ptr<float[]> scales_;
    std::unique_ptr<int32_t[]> starts_;
    InputRows<int32_t> words_;
};

// A group of inputs, for some rows and panels.
template <typename F>
struct Part {
    const RoundedRows<F>& rows;
    int64_t row, group;
    const uint8_t* codes;  // panels are panel_bytes apart
    int64_t panel_bytes;
    const float* scales;  // panels are scale_stride apart
    int64_t scale_stride;
    float* sums;  // rows are sums_stride apart, panels kPanel
    int64_t sums_stride;
};

template <typename F, int kRows, int kPanels>
void add_tile(const F& format, const Part<F>& part, int64_t first_panel) {
    constexpr int kBlockInputs = 4 * F::kBlockWords;
    Words sums[kRows][kPanels];
    for (int row = 0; row < kRows; ++row)
        for (Words& sum : sums[row]) sum = _mm512_set1_epi32(part.rows.start(part.row + row, part.group));
    const int32_t* x = part.rows.words(part.row, part.group);
    const int64_t stride = part.rows.stride(), num_blocks = part.rows.group_size() / kBlockInputs;
    const uint8_t* codes = part.codes + first_panel * part.panel_bytes;
    for (int64_t block = 0; block < num_blocks; ++block, x += F::kBlockWords, codes += kBlockBytes) {
        Words weights[kPanels][F::kBlockWords];
#pragma GCC unroll 4
        for (int panel = 0; panel < kPanels; ++panel) {
            const uint8_t* const from = codes + panel * part.panel_bytes;
            _mm_prefetch(reinterpret_cast<const char*>(from + kBytesAhead), _MM_HINT_T0);
            format.unpack(from, weights[panel]);
        }
#pragma GCC unroll 2
        for (int word = 0; word < F::kBlockWords; ++word)
#pragma GCC unroll 8
            for (int row = 0; row < kRows; ++row) {
                const Words inputs = _mm512_set1_epi32(x[row * stride + word]);
#pragma GCC unroll 4
                for (int panel = 0; panel < kPanels; ++panel)
                    sums[row][panel] = _mm512_dpbusd_epi32(sums[row][panel], weights[panel][word], inputs);
            }
    }
    for (int panel = 0; panel < kPanels; ++panel) {
        const Vector scale = load(part.scales + (first_panel + panel) * part.scale_stride);
        for (int row = 0; row < kRows; ++row) {
            float* const sum = part.sums + row * part.sums_stride + (first_panel + panel) * kPanel;
            const Vector product = multiply(_mm512_cvtepi32_ps(sums[row][panel]),
                                            broadcast(part.rows.scale(part.row + row, part.group)));
            store(sum, add(load(sum), multiply(product, scale)));
        }
    }
}

template <typename F, int kRows>
void add_rows(const F& format, const Part<F>& part) {
    constexpr int kPanels = kRows <= 4 ? kPanelsTogether : 2;
    for (int panel = 0; panel < kPanelsTogether; panel += kPanels) add_tile<F, kRows, kPanels>(format, part, panel);
}

template <typename F>
void add_group(const F& format, Part<F> part, int64_t num_rows) {
    for (; part.row < num_rows; part.row += kMostRows, part.sums += kMostRows * part.sums_stride)
        switch (std::min<int64_t>(kMostRows, num_rows - part.row)) {
            case 1: add_rows<F, 1>(format, part); break;
            case 2: add_rows<F, 2>(format, part); break;
            case 3: add_rows<F, 3>(format, part); break;
            case 4: add_rows<F, 4>(format, part); break;
            case 5: add_rows<F, 5>(format, part); break;
            case 6: add_rows<F, 6>(format, part); break;
            case 7: add_rows<F, 7>(format, part); break;
            default: add_rows<F, kMostRows>(format, part);
        }
}

// T: of x, bias and y.
template <typename F, typename T>
void run_product(Pool& pool, const Weight& weight, const T* x, int64_t num_rows, int64_t x_stride, const T* bias,
                 T* y) {
    const F format(weight);
    const RoundedRows<F> rows(pool, x, num_rows, x_stride, weight);
    const int64_t num_panels = padded_panels(weight.num_out), scale_stride = weight.num_groups() * kPanel;
    const int64_t most = panels_of_chunk(num_panels, pool.num_threads());
    const int64_t group_bytes = rows.group_size() / (4 * F::kBlockWords) * kBlockBytes;
    const int64_t panel_bytes = rows.num_groups() * group_bytes;
    pool.run(divide_up(num_panels, most), [&](int64_t chunk) {
        const int64_t first = chunk * most, panels = std::min(most, num_panels - first);
        const std::unique_ptr<float[]> sums(new float[static_cast<size_t>(num_rows * panels * kPanel)]());
        for (int64_t some = 0; some < panels; some += kPanelsTogether)  // each is read from end to end
            for (int64_t group = 0; group < rows.num_groups(); ++group) {
                const int64_t panel = first + some, scale = group * rows.group_size() / weight.group_size * kPanel;
                add_group<F>(format,
                             {rows, 0, group, weight.codes + panel * panel_bytes + group * group_bytes, panel_bytes,
                              weight.scales + panel * scale_stride + scale, scale_stride, sums.get() + some * kPanel,
                              panels * kPanel},
                             num_rows);
            }
        const int64_t first_out = first * kPanel, num_outs = std::min(panels * kPanel, weight.num_out - first_out);
        for (int64_t row = 0; row < num_rows && num_outs > 0; ++row)
            put_row(y + row * weight.num_out + first_out, sums.get() + row * panels * kPanel,
                    bias ? bias + first_out : nullptr, num_outs);
    });
}

}  // namespace
}  // namespace echelon
#endif

extern "C" {

// Whether products round their inputs on this CPU; otherwise they are those of quantized.cpp, as with many rows.
#if defined(__AVX512VNNI__)
bool echelon_rounds_inputs() { return true; }
#define ECHELON_RUN(bits, T)                                                                                        \
    if (num_rows <= packed->most_direct_rows) {                                                                     \
        const echelon::Weight weight{*packed, num_out, num_in};                                                     \
        return echelon::run_product<echelon::Bytes##bits, T>(*pool, weight, x, num_rows, x_stride, bias, y);        \
    }
#else
bool echelon_rounds_inputs() { return false; }
#define ECHELON_RUN(bits, T)
#endif

// Weights without zero points; arguments as in quantized.cpp.
#define ECHELON_INTEGERS(bits, name, T)                                                                              \
    void echelon_linear_integers##bits##_##name(echelon::Pool* pool, const T* x, int64_t num_rows, int64_t x_stride, \
                                                const echelon::PackedCodes* packed, int64_t num_out, int64_t num_in, \
                                                const T* bias, T* y) {                                               \
        ECHELON_RUN(bits, T)                                                                                         \
        echelon_linear_codes##bits##_##name(pool, x, num_rows, x_stride, packed, num_out, num_in, bias, y);          \
    }

ECHELON_INTEGERS(4, float32, float)
ECHELON_INTEGERS(4, bfloat16, uint16_t)
ECHELON_INTEGERS(8, float32, float)
ECHELON_INTEGERS(8, bfloat16, uint16_t)

}  // extern "C"
