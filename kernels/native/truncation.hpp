// The threshold that min-p, top-k and top-p set on a row, with the bits of kernels/sampling/truncation.py.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "sampling.hpp"
#include "vectors.hpp"

namespace echelon {

// e^(scaled - largest) in units of 2^-43, rounded down: integers, whose sum does not depend on the order.
inline int64_t mass_of(float scaled, float largest) {
    const float distance = scaled - largest, x = distance < -64.0f ? -64.0f : distance;
    const float n = std::floor(x * 0x1.715476p+0f + 0.5f);
    const float r = (x - n * 0x1.62e300p-1f) - n * 0x1.2fefa2p-17f;
    float y = static_cast<float>(1.0 / 5040);
    for (const double divisor : {720.0, 120.0, 24.0, 6.0, 2.0, 1.0, 1.0}) y = y * r + static_cast<float>(1.0 / divisor);
    return static_cast<int64_t>(y * std::bit_cast<float>((static_cast<int32_t>(n) + 43 + 127) << 23));
}

class Threshold {
  public:
    // scaled: the logits of a whole vocabulary, divided by the temperature; the largest of them.
    Threshold(const std::vector<float>& scaled, float largest) : scaled_(scaled), largest_(largest) {}

    // The scaled logit below which a token is excluded.
    float find(const Truncation& wanted) {
        float threshold = largest_ + wanted.log_min_p;
        if (0 < wanted.top_k && wanted.top_k <= size()) threshold = std::max(threshold, kth_largest(wanted.top_k));
        if (wanted.top_p < 1) threshold = std::max(threshold, nucleus(wanted.top_p, threshold));
        return threshold;
    }

  private:
    static constexpr int64_t kPart = 128;   // tokens whose largest gives a lower bound of the k-th largest
    static constexpr float kLikely = 8.0f;  // how far below the largest the threshold of top-p often is; not measured
    static constexpr float kNone = -std::numeric_limits<float>::infinity();

    struct Token {
        float scaled;
        int64_t mass;
    };

    int64_t size() const { return static_cast<int64_t>(scaled_.size()); }

    float kth_largest(int64_t k) {
        collect(kth_of_parts(k));
        const auto kth = candidates_.begin() + (k - 1);
        std::nth_element(candidates_.begin(), kth, candidates_.end(), is_better);
        return kth->scaled;
    }

    // The k-th largest of some tokens is not above the k-th largest of all.
    float kth_of_parts(int64_t k) const {
        std::vector<float> largest;
        for (int64_t first = 0; first < size(); first += kPart) {
            const auto begin = scaled_.begin() + first, end = scaled_.begin() + std::min(first + kPart, size());
            largest.push_back(*std::max_element(begin, end));
        }
        if (k > static_cast<int64_t>(largest.size())) return kNone;
        std::nth_element(largest.begin(), largest.begin() + (k - 1), largest.end(), std::greater<float>());
        return largest[static_cast<size_t>(k - 1)];
    }

    // The largest value for which the tokens not below it have a share `top_p` of the mass of those not below `least`.
    float nucleus(double top_p, float least) {
        int64_t total = 0;
        for (const float x : scaled_) {
            const int64_t mass = mass_of(x, largest_);  // of each, because that can be vectorised
            total += x >= least ? mass : 0;
        }
        const int64_t wanted = static_cast<int64_t>(std::ceil(top_p * static_cast<double>(total)));
        // Few tokens usually have the mass. If so, all better ones are among them too.
        if (mass_above(largest_ - kLikely) < wanted) mass_above(kNone);
        return reach(wanted);
    }

    // Collects the tokens not below a bound. Returns their mass.
    int64_t mass_above(float bound) {
        collect(bound);
        int64_t total = 0;
        for (Token& token : candidates_) total += token.mass = mass_of(token.scaled, largest_);
        return total;
    }

    // The value of the token that reaches the mass, counted from the largest value on: quickselect.
    float reach(int64_t wanted) {
        auto begin = candidates_.begin(), end = candidates_.end();
        while (end - begin > 1) {
            const auto middle = begin + (end - begin) / 2;
            std::nth_element(begin, middle, end, is_better);
            int64_t mass = 0;
            for (auto token = begin; token != middle; ++token) mass += token->mass;
            if (mass >= wanted) {
                end = middle;
            } else {
                begin = middle;
                wanted -= mass;
            }
        }
        return begin == end ? kNone : begin->scaled;
    }

    void collect(float bound) {
        candidates_.clear();
        for (const float x : scaled_)
            if (x >= bound) candidates_.push_back({x, 0});
    }

    static bool is_better(const Token& a, const Token& b) { return a.scaled > b.scaled; }

    const std::vector<float>& scaled_;
    const float largest_;
    std::vector<Token> candidates_;
};

// Whether all numbers are finite.
inline bool are_finite(const std::vector<float>& numbers) {
    Vector zeros = zero();  // x - x is NaN where x is not finite
    size_t i = 0;
    for (; i + kLanes <= numbers.size(); i += kLanes)
        zeros = add(zeros, subtract(load(&numbers[i]), load(&numbers[i])));
    float rest = 0;
    for (; i < numbers.size(); ++i) rest += numbers[i] - numbers[i];
    return sum_of(zeros) + rest == 0;
}

// Of the logits of a row; -Inf if some are not finite.
template <typename T>
float threshold_of(const T* logits, int64_t num_tokens, float temperature, const Truncation& wanted) {
    thread_local std::vector<float> scaled;
    scaled.resize(static_cast<size_t>(num_tokens));
    const float divisor = temperature > 0 ? temperature : 1.0f;
    for (int64_t i = 0; i < num_tokens; ++i) scaled[static_cast<size_t>(i)] = to_float(logits[i]) / divisor;
    if (!are_finite(scaled)) return -std::numeric_limits<float>::infinity();
    return Threshold(scaled, *std::max_element(scaled.begin(), scaled.end())).find(wanted);
}

}  // namespace echelon
