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

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "pool.hpp"
#include "vectors.hpp"

namespace echelon {
namespace {

constexpr int kBlockKeys = 64;
constexpr int64_t kSectionKeys = 1024;
constexpr int kTileRows = 32;
constexpr int kMaxHeadDim = 256;
constexpr int kDots = 8;  // keys whose scores are computed together

struct Shape {
    int64_t num_seqs, block_size, num_kv_heads, group, head_dim, window;
    int64_t q_token_stride, q_head_stride, table_stride;
    float scale;
};

template <typename T>
struct Arrays {
    const T* q;
    const T* k_cache;
    const T* v_cache;
    const int32_t* block_table;
    const int32_t* seq_lens;
    const int32_t* cu_seqlens;
    T* out;
};

// Some consecutive tokens of a seq, with the query heads of one KV head.
struct Tile {
    int64_t seq, first_token, num_tokens, first_position, kv_head;
};

struct Range {
    int64_t begin, end;
    bool operator==(const Range&) const = default;
};

// What a row has accumulated over a section, or over all sections so far.
struct RowState {
    float peak, total;
    float result[kMaxHeadDim];
};

// A thread's scratch memory.
struct Scratch {
    float queries[kTileRows][kMaxHeadDim];
    RowState section[kTileRows], whole[kTileRows];
    float keys[kBlockKeys * kMaxHeadDim], values[kBlockKeys * kMaxHeadDim];  // one row per head_dim: stays in the cache
    const float* key_rows[kBlockKeys];
    const float* value_rows[kBlockKeys];
};

inline const float* as_floats(const float* from, float*, int64_t) { return from; }
inline const float* as_floats(const uint16_t* from, float* to, int64_t count) {
    for (int64_t i = 0; i < count; ++i) to[i] = to_float(from[i]);
    return to;
}

float exp_of(float x) {
    alignas(64) float lanes[kLanes];
    store(lanes, exp(broadcast(x)));
    return lanes[0];
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

// Turns the scores of a row into weights and adds them to its total. Returns the decay of the earlier total.
float weigh(float* scores, Range keys, RowState& state) {
    constexpr float kHidden = -std::numeric_limits<float>::infinity();
    std::fill(scores, scores + keys.begin, kHidden);
    std::fill(scores + keys.end, scores + kBlockKeys, kHidden);
    const float peak = std::max(state.peak, *std::max_element(scores + keys.begin, scores + keys.end));
    const float decay = exp_of(state.peak - peak);
    Vector total = zero();
    for (int64_t key = 0; key < kBlockKeys; key += kLanes) {
        const Vector weight = exp(subtract(load(scores + key), broadcast(peak)));
        store(scores + key, weight);
        total = add(total, weight);
    }
    state.peak = peak;
    state.total = state.total * decay + sum_of(total);
    return decay;
}

// kRows rows that see the same keys of a block: those at places [begin, end) in it.
template <int kRows>
void attend_block(const float (*queries)[kMaxHeadDim], const Scratch& block, Range keys, int64_t head_dim,
                  RowState* states) {
    alignas(64) float weights[kRows][kBlockKeys];
    float decays[kRows];
    score<kRows>(queries, block.key_rows, keys, head_dim, weights);
    for (int row = 0; row < kRows; ++row) decays[row] = weigh(weights[row], keys, states[row]);
    constexpr int kVectors = 8 / kRows;
    int64_t i = 0;
    for (; i + kVectors * kLanes <= head_dim; i += kVectors * kLanes)
        add_values<kRows, kVectors>(weights, block.value_rows, keys, i, decays, states);
    for (; i < head_dim; i += kLanes) add_values<kRows, 1>(weights, block.value_rows, keys, i, decays, states);
}

void clear(RowState& state, int64_t head_dim) {
    state.peak = -std::numeric_limits<float>::infinity();
    state.total = 0;
    std::fill(state.result, state.result + head_dim, 0.0f);
}

void merge(const RowState& section, RowState& whole, int64_t head_dim) {
    if (section.total == 0) return;  // the row sees nothing of it
    if (whole.total == 0) {
        whole.peak = section.peak;
        whole.total = section.total;
        std::copy(section.result, section.result + head_dim, whole.result);
        return;
    }
    const float peak = std::max(whole.peak, section.peak);
    const float old_decay = exp_of(whole.peak - peak), new_decay = exp_of(section.peak - peak);
    whole.peak = peak;
    whole.total = whole.total * old_decay + section.total * new_decay;
    for (int64_t i = 0; i < head_dim; ++i)
        whole.result[i] = whole.result[i] * old_decay + section.result[i] * new_decay;
}

template <typename T>
class Attention {
  public:
    Attention(const Shape& shape, const Arrays<T>& arrays) : shape_(shape), arrays_(arrays) {}

    void run(Pool& pool) const {
        const std::vector<Tile> tiles = all_tiles();
        pool.run(static_cast<int64_t>(tiles.size()), [&](int64_t index) {
            thread_local Scratch scratch;
            attend(tiles[static_cast<size_t>(index)], scratch);
        });
    }

  private:
    std::vector<Tile> all_tiles() const {
        const int64_t tile_tokens = kTileRows / shape_.group;
        std::vector<Tile> tiles;
        for (int64_t seq = 0; seq < shape_.num_seqs; ++seq) {
            const int64_t first = arrays_.cu_seqlens[seq], end = arrays_.cu_seqlens[seq + 1];
            const int64_t first_position = arrays_.seq_lens[seq] - (end - first);
            for (int64_t token = first; token < end; token += tile_tokens)
                for (int64_t head = 0; head < shape_.num_kv_heads; ++head)
                    tiles.push_back({seq, token, std::min(tile_tokens, end - token), first_position + token - first, head});
        }
        return tiles;
    }

    // The keys that the token at this position sees.
    Range visible(int64_t position) const {
        return {shape_.window ? std::max<int64_t>(0, position - shape_.window + 1) : 0, position + 1};
    }

    void attend(const Tile& tile, Scratch& scratch) const {
        const int64_t num_rows = tile.num_tokens * shape_.group;
        for (int64_t row = 0; row < num_rows; ++row) {
            const T* from = query(tile, row);
            for (int64_t i = 0; i < shape_.head_dim; ++i) scratch.queries[row][i] = to_float(from[i]) * shape_.scale;
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

    void attend_rows(const Tile& tile, int64_t block, Range section, int64_t num_rows, Scratch& scratch) const {
        load_block(tile, block, {std::max(block, section.begin), std::min(block + kBlockKeys, section.end)}, scratch);
        for (int64_t row = 0; row < num_rows;) {
            const Range keys = places(tile, row, block);
            const bool is_pair = row + 1 < num_rows && places(tile, row + 1, block) == keys;
            const auto attend = is_pair ? attend_block<2> : attend_block<1>;
            if (keys.begin < keys.end)
                attend(&scratch.queries[row], scratch, keys, shape_.head_dim, &scratch.section[row]);
            row += is_pair ? 2 : 1;
        }
    }

    // The places in a block of the keys that a row sees.
    Range places(const Tile& tile, int64_t row, int64_t block) const {
        const Range seen = visible(tile.first_position + row / shape_.group);
        return {std::max(block, seen.begin) - block, std::min(block + kBlockKeys, seen.end) - block};
    }

    // Points the rows of the scratch at the keys and values at these positions; the block's other rows repeat one.
    void load_block(const Tile& tile, int64_t block, Range positions, Scratch& scratch) const {
        const int32_t* table = arrays_.block_table + tile.seq * shape_.table_stride;
        for (int64_t position = positions.begin; position < positions.end; ++position) {
            const int64_t slot = table[position / shape_.block_size] * shape_.block_size + position % shape_.block_size;
            const int64_t offset = (slot * shape_.num_kv_heads + tile.kv_head) * shape_.head_dim;
            const int64_t i = position - block;
            scratch.key_rows[i] = as_floats(arrays_.k_cache + offset, scratch.keys + i * shape_.head_dim, shape_.head_dim);
            scratch.value_rows[i] = as_floats(arrays_.v_cache + offset, scratch.values + i * shape_.head_dim, shape_.head_dim);
        }
        for (int64_t i = 0; i < positions.begin - block; ++i)
            scratch.key_rows[i] = scratch.key_rows[positions.begin - block];
        for (int64_t i = positions.end - block; i < kBlockKeys; ++i)
            scratch.key_rows[i] = scratch.key_rows[positions.begin - block];
    }

    const T* query(const Tile& tile, int64_t row) const {
        return arrays_.q + (tile.first_token + row / shape_.group) * shape_.q_token_stride +
               (tile.kv_head * shape_.group + row % shape_.group) * shape_.q_head_stride;
    }

    void write(const RowState& state, const Tile& tile, int64_t row) const {
        const int64_t num_heads = shape_.num_kv_heads * shape_.group;
        const int64_t head = tile.kv_head * shape_.group + row % shape_.group;
        T* to = arrays_.out + ((tile.first_token + row / shape_.group) * num_heads + head) * shape_.head_dim;
        for (int64_t i = 0; i < shape_.head_dim; ++i) put(to + i, state.result[i] / state.total);
    }

    const Shape shape_;
    const Arrays<T> arrays_;
};

}  // namespace
}  // namespace echelon

extern "C" {

#define ECHELON_ATTENTION(name, T)                                                                                    \
    void echelon_attention_##name(echelon::Pool* pool, const T* q, const T* k_cache, const T* v_cache,                \
                                  const int32_t* block_table, const int32_t* seq_lens, const int32_t* cu_seqlens,     \
                                  T* out, int64_t num_seqs, int64_t block_size, int64_t num_kv_heads, int64_t group,  \
                                  int64_t head_dim, int64_t window, int64_t q_token_stride, int64_t q_head_stride,    \
                                  int64_t table_stride, float scale) {                                                \
        const echelon::Shape shape{num_seqs, block_size,     num_kv_heads,  group,        head_dim,                   \
                                   window,   q_token_stride, q_head_stride, table_stride, scale};                     \
        echelon::Attention<T>(shape, {q, k_cache, v_cache, block_table, seq_lens, cu_seqlens, out}).run(*pool);       \
    }

ECHELON_ATTENTION(float32, float)
ECHELON_ATTENTION(bfloat16, uint16_t)

}  // extern "C"
