// The choice of tokens: scaled logits plus noise, with the bits of kernels/sampling.
//
// The noise of a token is a pure function of seed, sample, position and token: Philox4x32-10 (Salmon, Moraes, Dror, Shaw,
// SC 2011), then two logarithms of our own (kernels/sampling/gumbel.py). Every operation is a separate IEEE 754
// operation, written as loops over a tile of tokens that compilers vectorise.

#include "sampling.hpp"

#include <algorithm>
#include <array>
#include <bit>
#include <cstdint>
#include <limits>
#include <vector>

#include "truncation.hpp"
#include "vectors.hpp"

namespace echelon {
namespace {

constexpr int kGroup = 4;  // tokens whose noise one call of Philox draws
constexpr int kTileGroups = 32;
constexpr int kTile = kGroup * kTileGroups;  // tokens
constexpr int kPartTiles = 256;              // of a row that a thread looks through at a time
constexpr int kMostBest = 65;                // a choice and its runners-up
constexpr float kNothing = -std::numeric_limits<float>::infinity();
constexpr float kMostNoise = 22.9f;  // a bound

using GroupWords = uint32_t[kTileGroups];

// The random words of a tile: words[i][g] belongs to token 4 * (first_group + g) + i.
inline void draw(const RowSettings& row, uint32_t first_group, GroupWords* words) {
    GroupWords c0, c1, c2, c3;
    for (int g = 0; g < kTileGroups; ++g) {
        c0[g] = first_group + static_cast<uint32_t>(g);
        c1[g] = static_cast<uint32_t>(row.position);
        c2[g] = static_cast<uint32_t>(row.sample_index);
        c3[g] = 0;
    }
    uint32_t k0 = static_cast<uint32_t>(row.seed), k1 = static_cast<uint32_t>(row.seed >> 32);
    for (int round = 0; round < 10; ++round, k0 += 0x9e3779b9u, k1 += 0xbb67ae85u)
        for (int g = 0; g < kTileGroups; ++g) {
            const uint64_t product0 = uint64_t{0xd2511f53u} * c0[g], product1 = uint64_t{0xcd9e8d57u} * c2[g];
            c0[g] = static_cast<uint32_t>(product1 >> 32) ^ c1[g] ^ k0;
            c2[g] = static_cast<uint32_t>(product0 >> 32) ^ c3[g] ^ k1;
            c1[g] = static_cast<uint32_t>(product1);
            c3[g] = static_cast<uint32_t>(product0);
        }
    std::copy_n(c0, kTileGroups, words[0]);
    std::copy_n(c1, kTileGroups, words[1]);
    std::copy_n(c2, kTileGroups, words[2]);
    std::copy_n(c3, kTileGroups, words[3]);
}

// The k for which x / 2^k lies in [sqrt(1/2), sqrt(2)).
inline int32_t exponent_of(float x) { return (std::bit_cast<int32_t>(x) - 0x3f3504f3) >> 23; }
inline float two_to(int32_t exponent) { return std::bit_cast<float>((exponent << 23) + 0x3f800000); }

// log(2^exponent * (1 + f)) for 1 + f in [sqrt(1/2), sqrt(2)). Method and coefficients: FreeBSD, e_logf.c.
inline float log_of_scaled(float f, int32_t exponent) {
    const float s = f / (f + 2.0f), z = s * s, w = z * z;
    const float odd = z * (w * 0x91e9eep-25f + 0xaaaaaap-24f), even = w * (w * 0xf89e26p-26f + 0xccce13p-25f);
    const float half_square = (f * 0.5f) * f, k = static_cast<float>(exponent);
    const float small = s * (half_square + (odd + even)) + k * 0x1.2fefa2p-17f;
    return (small - half_square) + f + k * 0x1.62e300p-1f;
}

// Gumbel noise -log(-log(1 - w)) of 32 random bits, with w = (word + 1/2) / 2^32, at most 1 - 2^-24.
inline float noise_of(uint32_t word) {
    const uint32_t bounded = std::min(word, 0xffffff00u);  // what is above becomes 1 in fp32
    const float high = static_cast<float>(static_cast<int32_t>(bounded >> 16)) * 0x1p16f;
    const float w = (high + static_cast<float>(static_cast<int32_t>(bounded & 0xffffu)) + 0.5f) * 0x1p-32f;
    const int32_t exponent = exponent_of(1.0f - w);
    const float scale = two_to(-exponent);
    const float negative = -log_of_scaled((scale - 1.0f) - w * scale, exponent);
    const int32_t outer = exponent_of(negative);
    return -log_of_scaled(negative * two_to(-outer) - 1.0f, outer);
}

// The best tokens seen so far, best first; of equal values the lowest id, if ids come in ascending order.
class Best {
  public:
    explicit Best(int size) : size_(size) { values_.fill(kNothing); }

    float worst() const { return values_[static_cast<size_t>(size_ - 1)]; }
    float value(int place) const { return values_[static_cast<size_t>(place)]; }
    int64_t token(int place) const { return tokens_[static_cast<size_t>(place)]; }

    // value > worst()
    void put(float value, int64_t token) {
        size_t place = static_cast<size_t>(size_ - 1);
        for (; place > 0 && values_[place - 1] < value; --place) {
            values_[place] = values_[place - 1];
            tokens_[place] = tokens_[place - 1];
        }
        values_[place] = value;
        tokens_[place] = token;
    }

  private:
    int size_;
    std::array<float, kMostBest> values_;
    std::array<int64_t, kMostBest> tokens_{};
};

// Sum of e^(scaled logit - largest).
struct Softmax {
    float largest = kNothing, total = 0;

    void add(float other_largest, float other_total) {
        if (other_largest == kNothing) return;
        const float before = largest;
        largest = std::max(before, other_largest);
        total = (before == kNothing ? 0 : total * exp_once(before - largest)) +
                other_total * exp_once(other_largest - largest);
    }
    static float exp_once(float x) {
        alignas(64) float lanes[kLanes];
        store(lanes, exp(broadcast(x)));
        return lanes[0];
    }
};

// What is known about a row, or a part of it.
struct RowChoice {
    Best best;
    Softmax softmax;
    float scaled = kNothing;  // logit of the best token
    bool is_finite = true;
};

// Looks through logits of a vocabulary, or of the shard of it that begins with token `first_token`.
template <typename T>
class Chooser {
  public:
    Chooser(int64_t num_tokens, int64_t first_token, int num_best, bool with_softmax)
        : num_tokens_(num_tokens), first_token_(first_token), num_best_(num_best), with_softmax_(with_softmax) {}

    int64_t num_parts() const { return (num_tiles() + kPartTiles - 1) / kPartTiles; }

    RowChoice look_through(const T* logits, const RowSettings& row, int64_t part) const {
        RowChoice found{Best(num_best_)};
        const int64_t end = std::min(num_tiles(), (part + 1) * kPartTiles);
        for (int64_t tile = part * kPartTiles; tile < end; ++tile) add_tile(logits, row, tile, found);
        return found;
    }

    // The parts of a row come in order.
    RowChoice merge(const RowChoice* parts) const {
        RowChoice whole = parts[0];
        for (int64_t i = 1; i < num_parts(); ++i) {
            const RowChoice& part = parts[i];
            if (part.best.value(0) > whole.best.value(0)) whole.scaled = part.scaled;
            for (int place = 0; place < num_best_ && part.best.value(place) > whole.best.worst(); ++place)
                whole.best.put(part.best.value(place), part.best.token(place));
            whole.softmax.add(part.softmax.largest, part.softmax.total);
            whole.is_finite &= part.is_finite;
        }
        return whole;
    }

  private:
    int64_t skipped() const { return first_token_ % kGroup; }  // tokens of the first group that are another shard's
    int64_t num_tiles() const { return (skipped() + num_tokens_ + kTile - 1) / kTile; }

    void add_tile(const T* logits, const RowSettings& row, int64_t tile, RowChoice& found) const {
        alignas(64) float scaled[kTile], values[kTile];
        const int64_t first = tile * kTile - skipped();  // column
        if (!load_tile(logits, first, scaled)) found.is_finite = false;
        if (row.temperature > 0)
            for (float& x : scaled) x /= row.temperature;
        if (with_softmax_) add_softmax(scaled, found.softmax);
        for (int i = 0; i < kTile; ++i) values[i] = scaled[i] < row.threshold ? kNothing : scaled[i] + 0.0f;
        const float most = largest_in(values);
        if (row.temperature > 0) {
            if (most + kMostNoise < found.best.worst() || most == kNothing) return;
            add_noise(row, static_cast<uint32_t>((first_token_ + first) / kGroup), values);
            if (!(largest_in(values) > found.best.worst())) return;
        } else if (!(most > found.best.worst())) {
            return;
        }
        for (int i = 0; i < kTile; ++i)
            if (values[i] > found.best.worst()) {
                if (values[i] > found.best.value(0)) found.scaled = scaled[i];
                found.best.put(values[i], first_token_ + first + i);
            }
    }

    // Returns whether all logits are numbers. There is nothing in place of those that do not exist.
    bool load_tile(const T* logits, int64_t first, float* tile) const {
        const bool is_whole = first >= 0 && first + kTile <= num_tokens_;
        if (is_whole)
            for (int i = 0; i < kTile; i += kLanes) store(tile + i, widen(logits + first + i));
        else
            for (int64_t i = 0; i < kTile; ++i) {
                const int64_t column = first + i;
                tile[i] = 0 <= column && column < num_tokens_ ? to_float(logits[column]) : 0.0f;
            }
        Vector zeros = zero();  // x - x is NaN where x is no number
        for (int i = 0; i < kTile; i += kLanes) zeros = add(zeros, subtract(load(tile + i), load(tile + i)));
        if (!is_whole)
            for (int64_t i = 0; i < kTile; ++i)
                if (first + i < 0 || first + i >= num_tokens_) tile[i] = kNothing;
        return sum_of(zeros) == 0;
    }

    static float largest_in(const float* tile) {
        Vector most = load(tile);
        for (int i = kLanes; i < kTile; i += kLanes) most = larger(load(tile + i), most);
        return largest_of(most);
    }

    static void add_noise(const RowSettings& row, uint32_t first_group, float* values) {
        alignas(64) uint32_t words[kGroup][kTileGroups];
        alignas(64) float noise[kGroup][kTileGroups];
        draw(row, first_group, words);
        for (int i = 0; i < kGroup; ++i)
            for (int g = 0; g < kTileGroups; ++g) noise[i][g] = noise_of(words[i][g]);
        for (int g = 0; g < kTileGroups; ++g)
            for (int i = 0; i < kGroup; ++i) values[g * kGroup + i] += noise[i][g];
    }

    static void add_softmax(const float* scaled, Softmax& softmax) {
        const float largest = largest_in(scaled);
        if (largest == kNothing) return;
        Vector total = zero();
        for (int i = 0; i < kTile; i += kLanes)
            total = add(total, exp(subtract(load(scaled + i), broadcast(largest))));
        softmax.add(largest, sum_of(total));
    }

    int64_t num_tokens_, first_token_;
    int num_best_;
    bool with_softmax_;
};

}  // namespace

template <typename T>
void choose(Pool& pool, const T* logits, int64_t num_rows, int64_t num_tokens, int64_t stride, int64_t first_token,
            const RowSettings* rows, const Chosen& to) {
    const Chooser<T> chooser(num_tokens, first_token, to.num_best, to.confidences != nullptr);
    const int64_t num_parts = chooser.num_parts();
    std::vector<RowSettings> truncated(rows, rows + num_rows);
    pool.run(num_rows, [&](int64_t i) {
        RowSettings& row = truncated[static_cast<size_t>(i)];
        if (!row.truncation.is_on()) return;
        const float found = threshold_of(logits + i * stride, num_tokens, row.temperature, row.truncation);
        row.threshold = std::max(row.threshold, found);
    });
    std::vector<RowChoice> parts(static_cast<size_t>(num_rows * num_parts), RowChoice{Best(to.num_best)});
    pool.run(num_rows * num_parts, [&](int64_t i) {
        const int64_t row = i / num_parts;
        parts[static_cast<size_t>(i)] = chooser.look_through(logits + row * stride, truncated[static_cast<size_t>(row)], i % num_parts);
    });
    for (int64_t row = 0; row < num_rows; ++row) {
        const RowChoice found = chooser.merge(&parts[static_cast<size_t>(row * num_parts)]);
        for (int place = 0; place < to.num_best; ++place) {
            const float value = found.best.value(place);
            to.token_ids[row * to.num_best + place] = value > kNothing ? found.best.token(place) : first_token;
            to.values[row * to.num_best + place] = value;
        }
        if (to.confidences) {
            const Softmax& softmax = found.softmax;
            const bool is_possible = softmax.total > 0 && found.scaled > kNothing;
            to.confidences[row] = is_possible ? Softmax::exp_once(found.scaled - softmax.largest) / softmax.total : 0.0f;
        }
        if (to.is_finite) to.is_finite[row] = found.is_finite;
    }
}

template void choose(Pool&, const float*, int64_t, int64_t, int64_t, int64_t, const RowSettings*, const Chosen&);
template void choose(Pool&, const uint16_t*, int64_t, int64_t, int64_t, int64_t, const RowSettings*, const Chosen&);

}  // namespace echelon

extern "C" {

void echelon_choose_float32(echelon::Pool* pool, const float* logits, int64_t num_rows, int64_t num_tokens,
                            int64_t stride, int64_t first_token, const echelon::RowSettings* rows,
                            const echelon::Chosen* chosen) {
    echelon::choose<float>(*pool, logits, num_rows, num_tokens, stride, first_token, rows, *chosen);
}

}  // extern "C"
