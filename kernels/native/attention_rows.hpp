// What rows of attention accumulate: the online softmax over blocks of keys (FlashAttention, arXiv 2205.14135).
#pragma once

#include <algorithm>
#include <limits>

#include "vectors.hpp"

namespace echelon {

constexpr int kBlockKeys = 64;
constexpr int kMostRows = 128;  // that are computed together
constexpr int kMaxHeadDim = 256;

struct Range {
    int64_t begin, end;
    bool operator==(const Range&) const = default;
};

// What a row has accumulated over a section, or over all sections so far.
struct RowState {
    float peak, total;
    float result[kMaxHeadDim];
};

inline float exp_of(float x) {
    alignas(64) float lanes[kLanes];
    store(lanes, exp(broadcast(x)));
    return lanes[0];
}

// Turns the scores of a row into weights and adds them to its total. Returns the decay of the earlier total.
inline float weigh(float* scores, Range keys, RowState& state) {
    constexpr float kHidden = -std::numeric_limits<float>::infinity();
    std::fill(scores, scores + keys.begin, kHidden);
    std::fill(scores + keys.end, scores + kBlockKeys, kHidden);
    Vector most = broadcast(state.peak);
    for (int64_t key = 0; key < kBlockKeys; key += kLanes) most = larger(load(scores + key), most);  // skips NaN
    const float peak = largest_of(most);
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

inline void clear(RowState& state, int64_t head_dim) {
    state.peak = -std::numeric_limits<float>::infinity();
    state.total = 0;
    std::fill(state.result, state.result + head_dim, 0.0f);
}

inline void merge(const RowState& section, RowState& whole, int64_t head_dim) {
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

}  // namespace echelon
