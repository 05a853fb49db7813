// What a layer does between its products: norms, the gate of the MLP, and rotation with the write into the KV cache.
//
// torch needs up to ten calls for each of these, of 2 to 10 us each, which is more than a small model's products take.
// Values are fp32 inside and rounded once. A row is computed alone and in one order, so its bits depend on the row alone.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "pool.hpp"
#include "vectors.hpp"

namespace echelon {

constexpr int64_t kFewElements = 1 << 15;  // faster on the caller's thread than shared. Not measured.
constexpr int kSums = 4;                   // partial sums of a row, so that one addition need not wait for the last

template <typename Work>
void run_rows(Pool& pool, int64_t num_rows, int64_t row_elements, const Work& work) {
    if (num_rows * row_elements > kFewElements)
        pool.run(num_rows, work);
    else
        for (int64_t row = 0; row < num_rows; ++row) work(row);
}

// `count` elements, or a vector if there are more; zero in the place of others.
template <typename T>
Vector load_some(const T* from, int64_t count) {
    if (count >= kLanes) return widen(from);
    T part[kLanes] = {};
    std::copy_n(from, count, part);
    return widen(part);
}

template <typename T>
void store_some(T* to, Vector v, int64_t count) {
    alignas(64) float lanes[kLanes];
    store(lanes, v);
    if (count >= kLanes) {
        put_row<T>(to, lanes, nullptr, kLanes);
        return;
    }
    T part[kLanes];
    put_row<T>(part, lanes, nullptr, kLanes);
    std::copy_n(part, count, to);
}

// The addresses of rows that have two numbers, such as a token and a head.
template <typename T>
struct Rows {
    T* data;
    int64_t num_inner, outer_stride, inner_stride;

    T* at(int64_t row) const { return data + row / num_inner * outer_stride + row % num_inner * inner_stride; }
};

template <typename T>
float sum_of_squares(const T* x, int64_t size) {
    Vector sums[kSums] = {zero(), zero(), zero(), zero()};
    for (int64_t i = 0, n = 0; i < size; i += kLanes, ++n) {
        const Vector v = load_some(x + i, size - i);
        sums[n % kSums] = multiply_add(v, v, sums[n % kSums]);
    }
    return sum_of(add(add(sums[0], sums[1]), add(sums[2], sums[3])));
}

template <typename T>
void rms_norm(const T* x, const T* weight, T* out, int64_t size, float eps) {
    const float scale = 1.0f / std::sqrt(sum_of_squares(x, size) / static_cast<float>(size) + eps);
    for (int64_t i = 0; i < size; i += kLanes) {
        const Vector scaled = multiply(load_some(x + i, size - i), broadcast(scale));
        store_some(out + i, multiply(scaled, load_some(weight + i, size - i)), size - i);
    }
}

template <typename T>
void add_to(T* total, const T* x, int64_t size) {
    for (int64_t i = 0; i < size; i += kLanes)
        store_some(total + i, add(load_some(total + i, size - i), load_some(x + i, size - i)), size - i);
}

// x / (1 + e^-x), by exponentials of numbers up to zero.
inline Vector silu(Vector x) {
    const Vector small = exp(smaller(x, subtract(zero(), x)));  // e^-|x|
    const Vector one = broadcast(1.0f);
    return divide(multiply(x, where_less(x, zero(), small, one)), add(one, small));
}

template <typename T>
void silu_and_mul(const T* gate, const T* up, T* out, int64_t size) {
    for (int64_t i = 0; i < size; i += kLanes)
        store_some(out + i, multiply(silu(load_some(gate + i, size - i)), load_some(up + i, size - i)), size - i);
}

// Norms of `num_rows` rows of `size` elements. With a residual, x is added to it, and the sum is normalised.
template <typename T>
void rms_norm_rows(Pool& pool, const Rows<T>& x, const Rows<T>& residual, const T* weight, T* out, int64_t num_rows,
                   int64_t size, float eps) {
    run_rows(pool, num_rows, size, [&](int64_t row) {
        if (residual.data) add_to<T>(residual.at(row), x.at(row), size);
        rms_norm<T>(residual.data ? residual.at(row) : x.at(row), weight, out + row * size, size, eps);
    });
}

// gate_up: rows of 2 * size elements, `stride` apart.
template <typename T>
void silu_and_mul_rows(Pool& pool, const T* gate_up, T* out, int64_t num_rows, int64_t size, int64_t stride) {
    run_rows(pool, num_rows, size, [&](int64_t row) {
        const T* const gate = gate_up + row * stride;
        silu_and_mul<T>(gate, gate + size, out + row * size, size);
    });
}

// Rotates pairs (x[i], x[half + i]). Products are rounded before they are added, as everywhere: keys have the same bits
// on every device.
template <typename T>
void rotate(const T* x, const float* cos, const float* sin, int64_t half, T* to) {
    for (int64_t i = 0; i < half; i += kLanes) {
        const int64_t left = half - i;
        const Vector first = load_some(x + i, left), second = load_some(x + half + i, left);
        const Vector c = load_some(cos + i, left), s = load_some(sin + i, left);
        store_some(to + i, subtract(multiply(first, c), multiply(second, s)), left);
        store_some(to + half + i, add(multiply(second, c), multiply(first, s)), left);
    }
}

struct Heads {
    int64_t num_q, num_kv, head_dim, half;
};

template <typename T>
void rotate_and_cache(Pool& pool, int64_t num_tokens, const Heads& heads, const Rows<T>& q, const Rows<T>& k,
                      const Rows<T>& v, const float* cos, int64_t cos_stride, int64_t sin_offset, const int64_t* slots,
                      T* k_cache, T* v_cache) {
    run_rows(pool, num_tokens, (heads.num_q + heads.num_kv) * heads.head_dim, [&](int64_t token) {
        const float* const token_cos = cos + token * cos_stride;
        const float* const token_sin = token_cos + sin_offset + heads.half;  // the second half has the unchanged sign
        for (int64_t head = 0; head < heads.num_q; ++head) {
            T* const row = q.at(token * heads.num_q + head);
            rotate<T>(row, token_cos, token_sin, heads.half, row);
        }
        if (slots[token] < 0) return;
        for (int64_t head = 0; head < heads.num_kv; ++head) {
            const int64_t row = token * heads.num_kv + head;
            const int64_t place = (slots[token] * heads.num_kv + head) * heads.head_dim;
            const T* const key = k.at(row);
            rotate<T>(key, token_cos, token_sin, heads.half, k_cache + place);
            std::copy(key + 2 * heads.half, key + heads.head_dim, k_cache + place + 2 * heads.half);
            std::copy_n(v.at(row), heads.head_dim, v_cache + place);
        }
    });
}

}  // namespace echelon
