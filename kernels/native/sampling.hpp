// The choice of tokens: what sampling.cpp offers to others.
#pragma once

#include <cstdint>
#include <limits>

#include "pool.hpp"

namespace echelon {

// Laid out as in kernels/native/sampling.py.
struct Truncation {
    int64_t top_k;    // 0: off
    double top_p;     // 1: off
    float log_min_p;  // -Inf: off

    bool is_on() const { return top_k > 0 || top_p < 1 || log_min_p > -std::numeric_limits<float>::infinity(); }
};

// Of a row, besides its logits. Laid out as in kernels/native/sampling.py.
struct RowSettings {
    int64_t seed, sample_index, position;
    float temperature;      // 0: greedy
    float threshold;        // scaled logits below it are excluded
    Truncation truncation;  // excludes more; of a whole vocabulary only
};

// Where the choices of rows go; the last two may be null.
struct Chosen {
    int64_t* token_ids;  // [num_rows, num_best]; the first token where the value is -Inf
    float* values;       // [num_rows, num_best], scaled logit plus noise
    float* confidences;  // [num_rows], softmax probability of the choice; 0 where every token is excluded
    bool* is_finite;     // [num_rows], whether all logits are
    int num_best;
};

// The choices in rows that are `stride` apart. `first_token`: of a shard of the vocabulary.
template <typename T>
void choose(Pool& pool, const T* logits, int64_t num_rows, int64_t num_tokens, int64_t stride, int64_t first_token,
            const RowSettings* rows, const Chosen& to);

}  // namespace echelon
