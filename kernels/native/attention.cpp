// Causal attention over a paged KV cache on a CPU. A row's bits depend only on the row and on the keys that it sees.
//
// A row is a query head of a token. It goes through its keys in order of position, in blocks and sections that begin at
// fixed positions:
//
//   section of kSectionKeys keys: block of kBlockKeys keys: scores, their peak, weights = exp(score - peak), then
//   total = total * decay + sum(weights), result = result * decay + weights * values
//
// (the online softmax of FlashAttention, arXiv 2205.14135). The sections are merged in order. None of these operations
// depends on which rows are computed together, by which thread, or in how many calls.

#include "attention.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <vector>

#include "attention_rows.hpp"
#include "attention_tiles.hpp"

namespace echelon {
namespace {

constexpr int64_t kSectionKeys = 1024;
constexpr int kDots = 8;  // scores that are computed together

// Some consecutive tokens of a seq, with the query heads of one KV head.
struct Tile {
    int64_t seq, first_token, num_tokens, first_position, kv_head;
};

inline const float* as_floats(const float* from, float*, int64_t) { return from; }
inline const float* as_floats(const uint16_t* from, float* to, int64_t count) {
    for (int64_t i = 0; i < count; ++i) to[i] = to_float(from[i]);
    return to;
}

// Of a number in E4M3: a sign, 4 bits of exponent with bias 7, 3 bits of fraction; no infinities.
float e4m3_value(int bits) {
    const int exponent = bits >> 3 & 15, fraction = bits & 7;
    if ((bits & 0x7f) == 0x7f) return std::numeric_limits<float>::quiet_NaN();
    const float size = exponent ? std::ldexp(8.0f + static_cast<float>(fraction), exponent - 10)
                                : std::ldexp(static_cast<float>(fraction), -9);
    return bits & 0x80 ? -size : size;
}

const std::array<float, 256>& e4m3_values() {
    static const auto values = [] {
        std::array<float, 256> all;
        for (int bits = 0; bits < 256; ++bits) all[static_cast<size_t>(bits)] = e4m3_value(bits);
        return all;
    }();
    return values;
}

inline const float* as_floats(const uint8_t* from, float* to, int64_t count) {
    const float* const values = e4m3_values().data();
    for (int64_t i = 0; i < count; ++i) to[i] = values[from[i]];
    return to;
}

// Scores of kRows adjacent queries for a range of keys. kDots products are summed at a time.
template <int kRows>
void score(const float (*queries)[kMaxHeadDim], const float* const* keys, Range range, int64_t head_dim,
           float (*scores)[kBlockKeys]) {
    constexpr int kKeys = kDots / kRows;
    for (int64_t first = range.begin / kKeys * kKeys; first < range.end; first += kKeys) {
        Vector sums[kRows][kKeys];
        for (auto& row : sums)
            for (Vector& sum : row) sum = zero();
        for (int64_t i = 0; i < head_dim; i += kLanes)
            for (int key = 0; key < kKeys; ++key) {
                const Vector k = load(keys[first + key] + i);
                for (int row = 0; row < kRows; ++row)
                    sums[row][key] = multiply_add(load(queries[row] + i), k, sums[row][key]);
            }
        float lane_sums[kDots];
        sum_each(&sums[0][0], lane_sums);
        for (int row = 0; row < kRows; ++row) std::copy_n(lane_sums + row * kKeys, kKeys, scores[row] + first);
    }
}

// result = result * decay + weights * values for the kVectors * kLanes features from `first` on, for kRows rows.
template <int kRows, int kVectors>
void add_values(const float (*weights)[kBlockKeys], const float* const* values, Range keys, int64_t first,
                const float* decays, RowState* states) {
    Vector sums[kRows][kVectors];
    for (int row = 0; row < kRows; ++row)
        for (int v = 0; v < kVectors; ++v)
            sums[row][v] = multiply(load(states[row].result + first + v * kLanes), broadcast(decays[row]));
    for (int64_t key = keys.begin; key < keys.end; ++key)
        for (int v = 0; v < kVectors; ++v) {
            const Vector value = load(values[key] + first + v * kLanes);
            for (int row = 0; row < kRows; ++row)
                sums[row][v] = multiply_add(broadcast(weights[row][key]), value, sums[row][v]);
        }
    for (int row = 0; row < kRows; ++row)
        for (int v = 0; v < kVectors; ++v) store(states[row].result + first + v * kLanes, sums[row][v]);
}

// kRows rows that see the same keys of a block: those at places [begin, end) in it.
template <int kRows>
void attend_block(const float (*queries)[kMaxHeadDim], const float* const* key_rows, const float* const* value_rows,
                  Range keys, int64_t head_dim, RowState* states) {
    alignas(64) float weights[kRows][kBlockKeys];
    float decays[kRows];
    score<kRows>(queries, key_rows, keys, head_dim, weights);
    for (int row = 0; row < kRows; ++row) decays[row] = weigh(weights[row], keys, states[row]);
    constexpr int kVectors = 8 / kRows;
    int64_t i = 0;
    for (; i + kVectors * kLanes <= head_dim; i += kVectors * kLanes)
        add_values<kRows, kVectors>(weights, value_rows, keys, i, decays, states);
    for (; i < head_dim; i += kLanes) add_values<kRows, 1>(weights, value_rows, keys, i, decays, states);
}

// A block of keys and the rows that see it, in fp32.
template <typename T, typename C>
class VectorBlock {
  public:
    void begin(int64_t num_rows, int64_t head_dim, float scale) {
        num_rows_ = num_rows;
        head_dim_ = head_dim;
        scale_ = scale;
    }
    void set_query(int64_t row, const T* from) {
        for (int64_t i = 0; i < head_dim_; ++i) queries_[row][i] = to_float(from[i]) * scale_;
    }

    // Keys and values that do not exist are null. At least one exists.
    void set_block(const C* const* keys, const C* const* values) {
        const float* existing = nullptr;
        for (int64_t i = 0; i < kBlockKeys; ++i) {
            if (!keys[i]) continue;
            existing = key_rows_[i] = as_floats(keys[i], keys_ + i * head_dim_, head_dim_);
            value_rows_[i] = as_floats(values[i], values_ + i * head_dim_, head_dim_);
        }
        for (int64_t i = 0; i < kBlockKeys; ++i)
            if (!keys[i]) key_rows_[i] = existing;  // its score is not used
    }

    // seen: the places of the keys that each row sees.
    void attend(const Range* seen, RowState* states) {
        for (int64_t row = 0; row < num_rows_;) {
            const bool is_pair = row + 1 < num_rows_ && seen[row + 1] == seen[row];
            const auto attend = is_pair ? attend_block<2> : attend_block<1>;
            if (seen[row].begin < seen[row].end)
                attend(&queries_[row], key_rows_, value_rows_, seen[row], head_dim_, &states[row]);
            row += is_pair ? 2 : 1;
        }
    }

  private:
    int64_t num_rows_ = 0, head_dim_ = 0;
    float scale_ = 1;
    float queries_[kMostRows][kMaxHeadDim];
    float keys_[kBlockKeys * kMaxHeadDim], values_[kBlockKeys * kMaxHeadDim];  // a row per head_dim: stays in the cache
    const float* key_rows_[kBlockKeys];
    const float* value_rows_[kBlockKeys];
};

template <typename T, typename C>
struct BlockOf {
    using Type = VectorBlock<T, C>;
};
#if defined(__AMX_BF16__)
template <>
struct BlockOf<uint16_t, uint16_t> {
    using Type = TileBlock;
};
#endif

// A thread's scratch memory.
template <typename T, typename C>
struct AttentionScratch {
    typename BlockOf<T, C>::Type block;
    RowState section[kMostRows], whole[kMostRows];
};

template <typename T, typename C>
class Attention {
  public:
    Attention(const AttentionShape& shape, const AttentionArrays<T, C>& arrays) : shape_(shape), arrays_(arrays) {}

    void run(Pool& pool) const {
        const std::vector<Tile> tiles = all_tiles();
        pool.run(static_cast<int64_t>(tiles.size()), [&](int64_t index) {
            thread_local AttentionScratch<T, C> scratch;
            attend(tiles[static_cast<size_t>(index)], scratch);
        });
    }

  private:
    std::vector<Tile> all_tiles() const {
        const int64_t tile_tokens = kMostRows / shape_.group;
        std::vector<Tile> tiles;
        for (int64_t seq = 0; seq < shape_.num_seqs; ++seq) {
            const int64_t first = arrays_.cu_seqlens[seq], end = arrays_.cu_seqlens[seq + 1];
            const int64_t first_position = arrays_.seq_lens[seq] - (end - first);
            for (int64_t token = first; token < end; token += tile_tokens) {
                const int64_t num_tokens = std::min(tile_tokens, end - token);
                for (int64_t head = 0; head < shape_.num_kv_heads; ++head)
                    tiles.push_back({seq, token, num_tokens, first_position + token - first, head});
            }
        }
        return tiles;
    }

    // The keys that the token at this position sees.
    Range visible(int64_t position) const {
        return {shape_.window ? std::max<int64_t>(0, position - shape_.window + 1) : 0, position + 1};
    }

    void attend(const Tile& tile, AttentionScratch<T, C>& scratch) const {
        const int64_t num_rows = tile.num_tokens * shape_.group;
        const float k_scale = arrays_.k_scales ? arrays_.k_scales[tile.kv_head] : 1.0f;
        scratch.block.begin(num_rows, shape_.head_dim, shape_.scale * k_scale);
        for (int64_t row = 0; row < num_rows; ++row) {
            scratch.block.set_query(row, query(tile, row));
            clear(scratch.whole[row], shape_.head_dim);
        }
        const Range keys{visible(tile.first_position).begin, tile.first_position + tile.num_tokens};
        for (int64_t first = keys.begin / kSectionKeys * kSectionKeys; first < keys.end; first += kSectionKeys) {
            for (int64_t row = 0; row < num_rows; ++row) clear(scratch.section[row], shape_.head_dim);
            const Range section{std::max(first, keys.begin), std::min(first + kSectionKeys, keys.end)};
            for (int64_t block = section.begin / kBlockKeys * kBlockKeys; block < section.end; block += kBlockKeys)
                attend_rows(tile, block, section, num_rows, scratch);
            for (int64_t row = 0; row < num_rows; ++row)
                merge(scratch.section[row], scratch.whole[row], shape_.head_dim);
        }
        for (int64_t row = 0; row < num_rows; ++row) write(scratch.whole[row], tile, row);
    }

    void attend_rows(const Tile& tile, int64_t block, Range section, int64_t num_rows,
                     AttentionScratch<T, C>& scratch) const {
        const C *keys[kBlockKeys] = {}, *values[kBlockKeys] = {};
        const int64_t end = std::min(block + kBlockKeys, section.end);
        visit(tile, {std::max(block, section.begin), end}, [&](int64_t position, int64_t offset) {
            keys[position - block] = arrays_.k_cache + offset;
            values[position - block] = arrays_.v_cache + offset;
        });
        // They lie too far apart for the processor to foresee the next ones.
        visit(tile, {end, std::min(end + kBlockKeys, section.end)}, [&](int64_t, int64_t offset) {
            for (int64_t i = 0; i < shape_.head_dim; i += 64 / static_cast<int64_t>(sizeof(C))) {
                __builtin_prefetch(arrays_.k_cache + offset + i, 0, 2);
                __builtin_prefetch(arrays_.v_cache + offset + i, 0, 2);
            }
        });
        Range seen[kMostRows];
        for (int64_t row = 0; row < num_rows; ++row) seen[row] = places(tile, row, block);
        scratch.block.set_block(keys, values);
        scratch.block.attend(seen, scratch.section);
    }

    // Calls act(position, where its key and its value lie in their caches). Divides once, not for each position.
    template <typename Act>
    void visit(const Tile& tile, Range positions, const Act& act) const {
        const int32_t* block =
            arrays_.block_table + tile.seq * shape_.table_stride + positions.begin / shape_.block_size;
        int64_t place = positions.begin % shape_.block_size;
        for (int64_t position = positions.begin; position < positions.end; ++position) {
            const int64_t slot = *block * shape_.block_size + place;
            act(position, (slot * shape_.num_kv_heads + tile.kv_head) * shape_.head_dim);
            if (++place == shape_.block_size) {
                place = 0;
                ++block;
            }
        }
    }

    // The places in a block of the keys that a row sees.
    Range places(const Tile& tile, int64_t row, int64_t block) const {
        const Range seen = visible(tile.first_position + row / shape_.group);
        return {std::max(block, seen.begin) - block, std::min(block + kBlockKeys, seen.end) - block};
    }

    const T* query(const Tile& tile, int64_t row) const {
        return arrays_.q + (tile.first_token + row / shape_.group) * shape_.q_token_stride +
               (tile.kv_head * shape_.group + row % shape_.group) * shape_.q_head_stride;
    }

    void write(const RowState& state, const Tile& tile, int64_t row) const {
        const int64_t num_heads = shape_.num_kv_heads * shape_.group;
        const int64_t head = tile.kv_head * shape_.group + row % shape_.group;
        T* to = arrays_.out + ((tile.first_token + row / shape_.group) * num_heads + head) * shape_.head_dim;
        const float v_scale = arrays_.v_scales ? arrays_.v_scales[tile.kv_head] : 1.0f;
        for (int64_t i = 0; i < shape_.head_dim; ++i) put(to + i, state.result[i] / state.total * v_scale);
    }

    const AttentionShape shape_;
    const AttentionArrays<T, C> arrays_;
};

}  // namespace

template <typename T, typename C>
void attend(Pool& pool, const AttentionShape& shape, const AttentionArrays<T, C>& arrays) {
    Attention<T, C>(shape, arrays).run(pool);
}

template void attend(Pool&, const AttentionShape&, const AttentionArrays<float, float>&);
template void attend(Pool&, const AttentionShape&, const AttentionArrays<uint16_t, uint16_t>&);

}  // namespace echelon

extern "C" {

#define ECHELON_ATTENTION(name, T, C)                                                                                 \
    void echelon_attention_##name(echelon::Pool* pool, const T* q, const C* k_cache, const C* v_cache,                \
                                  const int32_t* block_table, const int32_t* seq_lens, const int32_t* cu_seqlens,     \
                                  T* out, int64_t num_seqs, int64_t block_size, int64_t num_kv_heads, int64_t group,  \
                                  int64_t head_dim, int64_t window, int64_t q_token_stride, int64_t q_head_stride,    \
                                  int64_t table_stride, float scale, const float* k_scales, const float* v_scales) {  \
        const echelon::AttentionShape shape{num_seqs, block_size,     num_kv_heads,  group,        head_dim,          \
                                            window,   q_token_stride, q_head_stride, table_stride, scale};            \
        echelon::attend<T, C>(*pool, shape,                                                                           \
                              {q, k_cache, v_cache, block_table, seq_lens, cu_seqlens, out, k_scales, v_scales});     \
    }

ECHELON_ATTENTION(float32, float, float)
ECHELON_ATTENTION(bfloat16, uint16_t, uint16_t)
ECHELON_ATTENTION(float32_e4m3, float, uint8_t)
ECHELON_ATTENTION(bfloat16_e4m3, uint16_t, uint8_t)

}  // extern "C"
