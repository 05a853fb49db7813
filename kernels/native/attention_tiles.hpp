// The products of attention in bf16 by the tile unit of the CPU (AMX): 64 keys for up to 32 rows at a time.
#pragma once

#include "attention_rows.hpp"
#include "tiles.hpp"

#if defined(__AMX_BF16__)

namespace echelon {

// The rows of a matrix of 32-bit elements become its columns.
inline void transpose_16x16(__m512i* m) {
    __m512i a[16], b[16];
    for (int i = 0; i < 16; i += 2) {
        a[i] = _mm512_unpacklo_epi32(m[i], m[i + 1]);
        a[i + 1] = _mm512_unpackhi_epi32(m[i], m[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        b[i] = _mm512_unpacklo_epi64(a[i], a[i + 2]);
        b[i + 1] = _mm512_unpackhi_epi64(a[i], a[i + 2]);
        b[i + 2] = _mm512_unpacklo_epi64(a[i + 1], a[i + 3]);
        b[i + 3] = _mm512_unpackhi_epi64(a[i + 1], a[i + 3]);
    }
    for (int i = 0; i < 4; ++i) {
        const __m512i even_low = _mm512_shuffle_i32x4(b[i], b[4 + i], 0x88);
        const __m512i even_high = _mm512_shuffle_i32x4(b[8 + i], b[12 + i], 0x88);
        const __m512i odd_low = _mm512_shuffle_i32x4(b[i], b[4 + i], 0xdd);
        const __m512i odd_high = _mm512_shuffle_i32x4(b[8 + i], b[12 + i], 0xdd);
        m[i] = _mm512_shuffle_i32x4(even_low, even_high, 0x88);
        m[8 + i] = _mm512_shuffle_i32x4(even_low, even_high, 0xdd);
        m[4 + i] = _mm512_shuffle_i32x4(odd_low, odd_high, 0x88);
        m[12 + i] = _mm512_shuffle_i32x4(odd_low, odd_high, 0xdd);
    }
}

// A block of keys and the rows that see it, in bf16. Scores and sums are fp32; weights are rounded to bf16, as
// FlashAttention does. Heads are padded with zeros to a multiple of 64 features.
class TileBlock {
  public:
    void begin(int64_t num_rows, int64_t head_dim, float scale) {
        num_rows_ = num_rows;
        head_dim_ = head_dim;
        features_ = divide_up(head_dim, 64) * 64;
        scale_ = scale;
    }
    void set_query(int64_t row, const uint16_t* from) {
        for (int64_t i = 0; i < features_; i += 32) store_words(queries_ + row * features_ + i, load_part(from, i));
    }

    // Keys and values that do not exist are null and count as zero.
    void set_block(const uint16_t* const* keys, const uint16_t* const* values) {
        set_keys(keys);
        set_values(values);
    }

    // seen: the places of the keys that each row sees.
    void attend(const Range* seen, RowState* states) {
        for (int64_t row = 0; row < num_rows_; row += kPairRows)
            attend_rows(row, std::min(kPairRows, num_rows_ - row), seen + row, states + row);
    }

  private:
    static constexpr int64_t kPairRows = 2 * kTileRows;

    // As tiles of 32 features of 16 keys: two features of each key side by side.
    void set_keys(const uint16_t* const* keys) {
        for (int64_t first = 0; first < kBlockKeys; first += kTileRows)
            for (int64_t i = 0; i < features_; i += kInputsTogether) {
                __m512i tile[kTileRows];
                for (int key = 0; key < kTileRows; ++key) tile[key] = load_part(keys[first + key], i);
                transpose_16x16(tile);
                uint16_t* const to = keys_ + first * features_ + i * kPanel;
                for (int pair = 0; pair < kTileRows; ++pair) store_words(to + pair * 32, tile[pair]);
            }
    }

    // As tiles of 16 features of 32 keys: two keys of each feature side by side.
    void set_values(const uint16_t* const* values) {
        alignas(64) uint16_t places[2][32];  // of the features of an even key, then of an odd one
        for (int i = 0; i < 32; ++i)
            for (int half = 0; half < 2; ++half)
                places[half][i] = static_cast<uint16_t>(half * 16 + i / 2 + i % 2 * 32);
        const __m512i low = load_words(places[0]), high = load_words(places[1]);
        for (int64_t key = 0; key < kBlockKeys; key += 2)
            for (int64_t i = 0; i < features_; i += 32) {
                const __m512i even = load_part(values[key], i), odd = load_part(values[key + 1], i);
                uint16_t* const to = values_ + i * kBlockKeys + key * kPanel;
                store_words(to, _mm512_permutex2var_epi16(even, low, odd));
                store_words(to + kPanel * kBlockKeys, _mm512_permutex2var_epi16(even, high, odd));
            }
    }

    void attend_rows(int64_t first, int64_t num_rows, const Range* seen, RowState* states) {
        const bool is_pair = num_rows > kTileRows;  // of tiles
        const TileShapes shapes(is_pair ? kTileRows : num_rows, is_pair ? num_rows - kTileRows : num_rows);
        const uint16_t* const queries = queries_ + first * features_;
        multiply(is_pair, {queries, features_, keys_, features_ * kPanel, features_}, products_, kBlockKeys);
        float decays[kPairRows];
        for (int64_t row = 0; row < num_rows; ++row)
            decays[row] = weigh_row(products_ + row * kBlockKeys, seen[row], states[row], weights_ + row * kBlockKeys);
        multiply(is_pair, {weights_, kBlockKeys, values_, kBlockKeys * kPanel, kBlockKeys}, products_, features_);
        for (int64_t row = 0; row < num_rows; ++row)
            for (int64_t i = 0; i < head_dim_; i += kLanes) {
                float* const result = states[row].result + i;
                const Vector product = load(products_ + row * features_ + i);
                store(result, multiply_add(load(result), broadcast(decays[row]), product));
            }
    }

    // Scores become weights. Returns the decay of what the row has so far.
    float weigh_row(float* scores, Range seen, RowState& state, uint16_t* weights) const {
        const bool sees = seen.begin < seen.end;
        for (int64_t i = 0; i < kBlockKeys; i += kLanes)
            store(scores + i, sees ? echelon::multiply(load(scores + i), broadcast(scale_)) : zero());
        const float decay = sees ? weigh(scores, seen, state) : 1.0f;
        put_row<uint16_t>(weights, scores, nullptr, kBlockKeys);
        return decay;
    }

    static void store_words(uint16_t* to, __m512i words) { _mm512_store_si512(to, words); }

    // 32 features from the given one on, zero after the last.
    __m512i load_part(const uint16_t* from, int64_t first) const {
        const int64_t left = from ? head_dim_ - first : 0;
        if (left >= 32) return load_words(from + first);
        return left <= 0 ? _mm512_setzero_si512() : _mm512_maskz_loadu_epi16((1u << left) - 1, from + first);
    }

    // The rows of a pair of tiles, or of one, times `num_outs` outputs, a multiple of 64.
    static void multiply(bool is_pair, TileOperands from, float* sums, int64_t num_outs) {
        const int64_t panels_at_once = is_pair ? 2 : 4;
        for (int64_t out = 0; out < num_outs; out += panels_at_once * kPanel) {
            if (is_pair)
                multiply_2x2(from, sums + out, num_outs);
            else
                multiply_1x4(from, sums + out, num_outs);
            from.panels += panels_at_once * from.panel_stride;
        }
    }

    int64_t num_rows_ = 0, head_dim_ = 0, features_ = 0;
    float scale_ = 1;
    alignas(64) uint16_t queries_[kMostRows * kMaxHeadDim];
    alignas(64) uint16_t keys_[kBlockKeys * kMaxHeadDim];
    alignas(64) uint16_t values_[kBlockKeys * kMaxHeadDim];
    alignas(64) uint16_t weights_[kPairRows * kBlockKeys];
    alignas(64) float products_[kPairRows * kMaxHeadDim];
};

}  // namespace echelon

#endif
