// Rounds weights to 4 or 8 bits on a CPU: see kernels/layers/quantized.py, whose torch code takes ten times as long.

#include <algorithm>
#include <cmath>
#include <vector>

#include "pool.hpp"
#include "vectors.hpp"

namespace echelon {
namespace {

struct Range {
    float lowest, highest;  // codes
};

// The weights of a group, with zeros up to a whole number of vectors.
class Group {
  public:
    explicit Group(int64_t most) : values_(static_cast<size_t>((most + kLanes - 1) / kLanes * kLanes)) {}

    template <typename T>
    void read(const T* from, int64_t size) {
        std::fill(values_.begin(), values_.end(), 0.0f);
        for (int64_t i = 0; i < size; ++i) values_[static_cast<size_t>(i)] = to_float(from[i]);
        num_vectors_ = (size + kLanes - 1) / kLanes;
    }

    // The first value of the largest magnitude; NaN if one is not finite.
    float extreme() const {
        Vector most = zero(), wrong = zero();
        for (int64_t v = 0; v < num_vectors_; ++v) {
            most = larger(most, larger(at(v), subtract(zero(), at(v))));
            wrong = multiply_add(at(v), zero(), wrong);  // NaN, if a value is not finite
        }
        const float largest = largest_of(most), sum_of_wrong = sum_of(wrong);
        if (sum_of_wrong != 0.0f) return sum_of_wrong;
        return *std::find_if(values_.begin(), values_.end(), [&](float value) { return std::abs(value) == largest; });
    }

    // Of the weights rounded with this scale.
    float squared_error(float scale, Range range) const {
        Vector sum = zero();
        for (int64_t v = 0; v < num_vectors_; ++v) {
            const Vector value = at(v), error = subtract(multiply(code(value, scale, range), broadcast(scale)), value);
            sum = multiply_add(error, error, sum);
        }
        return sum_of(sum);
    }

    void put_codes(float scale, Range range, int8_t* to, int64_t size) const {
        alignas(64) float codes[kLanes];
        for (int64_t v = 0; v < num_vectors_; ++v) {
            store(codes, code(at(v), scale, range));
            for (int64_t i = 0; i < kLanes && v * kLanes + i < size; ++i)
                to[v * kLanes + i] = static_cast<int8_t>(codes[i]);
        }
    }

  private:
    Vector at(int64_t v) const { return load(values_.data() + v * kLanes); }
    static Vector code(Vector value, float scale, Range range) {
        const Vector nearest = rounded(divide(value, broadcast(scale)));
        return smaller(larger(nearest, broadcast(range.lowest)), broadcast(range.highest));
    }

    std::vector<float> values_;
    int64_t num_vectors_ = 0;
};

// The scale of a group. Writes its codes.
float round_group(const Group& group, Range range, int8_t* codes, int64_t size) {
    const float extreme = group.extreme();
    if (!(extreme < 0.0f || extreme > 0.0f)) {  // all zeros, or NaN
        std::fill_n(codes, size, int8_t{0});
        return extreme;
    }
    float scale = extreme / range.lowest, least = group.squared_error(scale, range);
    for (const float extreme_code : {range.highest, -range.highest}) {
        const float other = extreme / extreme_code, error = group.squared_error(other, range);
        if (error < least) scale = other, least = error;
    }
    group.put_codes(scale, range, codes, size);
    return scale;
}

// codes: [num_out, num_in]; scales: [num_out, num_groups]
template <typename T>
void round(Pool& pool, const T* weight, int64_t num_out, int64_t num_in, int64_t stride, int64_t group_size, Range range,
           int8_t* codes, float* scales) {
    const int64_t num_groups = (num_in + group_size - 1) / group_size;
    pool.run(num_out, [&](int64_t out) {
        Group group(group_size);
        for (int64_t index = 0; index < num_groups; ++index) {
            const int64_t start = index * group_size, size = std::min(group_size, num_in - start);
            group.read(weight + out * stride + start, size);
            scales[out * num_groups + index] = round_group(group, range, codes + out * num_in + start, size);
        }
    });
}

}  // namespace
}  // namespace echelon

extern "C" {

#define ECHELON_ROUND(name, T)                                                                                      \
    void echelon_round_##name(echelon::Pool* pool, const T* weight, int64_t num_out, int64_t num_in, int64_t stride, \
                              int64_t group_size, float lowest, float highest, int8_t* codes, float* scales) {      \
        echelon::round<T>(*pool, weight, num_out, num_in, stride, group_size, {lowest, highest}, codes, scales);    \
    }

ECHELON_ROUND(float32, float)
ECHELON_ROUND(bfloat16, uint16_t)

}  // extern "C"
