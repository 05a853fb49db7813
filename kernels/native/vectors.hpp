// Vectors of fp32 and the operations that products need: AVX2, AVX-512 and AVX-512 with bf16 instructions.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace echelon {

#if defined(__AVX512F__)
using Vector = __m512;
constexpr int kLanes = 16;
constexpr int kAccumulators = 24;  // of 32 registers: the others hold weights and an input

inline Vector zero() { return _mm512_setzero_ps(); }
inline Vector load(const float* from) { return _mm512_loadu_ps(from); }
inline void store(float* to, Vector v) { _mm512_storeu_ps(to, v); }
inline Vector broadcast(float x) { return _mm512_set1_ps(x); }
inline Vector multiply_add(Vector a, Vector b, Vector sum) { return _mm512_fmadd_ps(a, b, sum); }
inline Vector add(Vector a, Vector b) { return _mm512_add_ps(a, b); }
inline Vector subtract(Vector a, Vector b) { return _mm512_sub_ps(a, b); }
inline Vector multiply(Vector a, Vector b) { return _mm512_mul_ps(a, b); }
inline Vector divide(Vector a, Vector b) { return _mm512_div_ps(a, b); }
inline Vector larger(Vector a, Vector b) { return _mm512_max_ps(a, b); }  // b where either is NaN
inline Vector smaller(Vector a, Vector b) { return _mm512_min_ps(a, b); }  // likewise
inline Vector rounded(Vector x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline Vector power_of_two(Vector n) {  // of whole numbers -126 to 127
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127)), 23));
}
inline Vector where_less(Vector a, Vector b, Vector then, Vector otherwise) {  // lane by lane; NaN is not less
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), otherwise, then);
}
inline Vector widen(const float* from) { return _mm512_loadu_ps(from); }
inline Vector widen(const uint16_t* bf16) {
    const __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(bf16));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(words), 16));
}
inline __m256 halves(Vector v) { return _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1)); }
using Words = __m512i;
inline Words load_words(const uint16_t* from) { return _mm512_loadu_si512(from); }
inline Vector low_bf16(Words w) { return _mm512_castsi512_ps(_mm512_slli_epi32(w, 16)); }
inline Vector high_bf16(Words w) {
    return _mm512_castsi512_ps(_mm512_and_si512(w, _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
}
#else
using Vector = __m256;
constexpr int kLanes = 8;
constexpr int kAccumulators = 12;  // of 16 registers

inline Vector zero() { return _mm256_setzero_ps(); }
inline Vector load(const float* from) { return _mm256_loadu_ps(from); }
inline void store(float* to, Vector v) { _mm256_storeu_ps(to, v); }
inline Vector broadcast(float x) { return _mm256_set1_ps(x); }
inline Vector multiply_add(Vector a, Vector b, Vector sum) { return _mm256_fmadd_ps(a, b, sum); }
inline Vector add(Vector a, Vector b) { return _mm256_add_ps(a, b); }
inline Vector subtract(Vector a, Vector b) { return _mm256_sub_ps(a, b); }
inline Vector multiply(Vector a, Vector b) { return _mm256_mul_ps(a, b); }
inline Vector divide(Vector a, Vector b) { return _mm256_div_ps(a, b); }
inline Vector larger(Vector a, Vector b) { return _mm256_max_ps(a, b); }  // b where either is NaN
inline Vector smaller(Vector a, Vector b) { return _mm256_min_ps(a, b); }  // likewise
inline Vector rounded(Vector x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline Vector power_of_two(Vector n) {  // of whole numbers -126 to 127
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23));
}
inline Vector where_less(Vector a, Vector b, Vector then, Vector otherwise) {  // lane by lane; NaN is not less
    return _mm256_blendv_ps(otherwise, then, _mm256_cmp_ps(a, b, _CMP_LT_OQ));
}
inline Vector widen(const float* from) { return _mm256_loadu_ps(from); }
inline Vector widen(const uint16_t* bf16) {
    const __m128i words = _mm_loadu_si128(reinterpret_cast<const __m128i*>(bf16));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(words), 16));
}
inline __m256 halves(Vector v) { return v; }
using Words = __m256i;
inline Words load_words(const uint16_t* from) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)); }
inline Vector low_bf16(Words w) { return _mm256_castsi256_ps(_mm256_slli_epi32(w, 16)); }
inline Vector high_bf16(Words w) {
    return _mm256_castsi256_ps(_mm256_and_si256(w, _mm256_set1_epi32(static_cast<int>(0xffff0000u))));
}
#endif

// The sums of the lanes of 8 vectors.
inline void sum_each(const Vector* vectors, float* sums) {
    __m256 v[8];
    for (int i = 0; i < 8; ++i) v[i] = halves(vectors[i]);
    const __m256 first = _mm256_hadd_ps(_mm256_hadd_ps(v[0], v[1]), _mm256_hadd_ps(v[2], v[3]));
    const __m256 last = _mm256_hadd_ps(_mm256_hadd_ps(v[4], v[5]), _mm256_hadd_ps(v[6], v[7]));
    const __m256 low = _mm256_permute2f128_ps(first, last, 0x20), high = _mm256_permute2f128_ps(first, last, 0x31);
    _mm256_storeu_ps(sums, _mm256_add_ps(low, high));
}

inline float sum_of(Vector v) {
    const __m256 sums = halves(v);
    __m128 sum = _mm_add_ps(_mm256_castps256_ps128(sums), _mm256_extractf128_ps(sums, 1));
    sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
    return _mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)));
}

inline float largest_of(Vector v) {
    alignas(64) float lanes[kLanes];
    store(lanes, v);
    __m256 most = _mm256_load_ps(lanes);
    for (int i = 8; i < kLanes; i += 8) most = _mm256_max_ps(most, _mm256_load_ps(lanes + i));
    __m128 half = _mm_max_ps(_mm256_castps256_ps128(most), _mm256_extractf128_ps(most, 1));
    half = _mm_max_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_max_ss(half, _mm_movehdup_ps(half)));
}

// e^x for x <= 0 within 2 units in the last place, 0 below -87; NaN stays NaN. Coefficients: Cephes, expf.
inline Vector exp(Vector x) {
    const Vector lowest = broadcast(-87.0f);
    const Vector bounded = larger(lowest, x);
    const Vector n = rounded(multiply(bounded, broadcast(1.44269504f)));
    Vector rest = multiply_add(n, broadcast(-0.693359375f), bounded);
    rest = multiply_add(n, broadcast(2.12194440e-4f), rest);
    Vector y = broadcast(1.9875691500e-4f);
    y = multiply_add(y, rest, broadcast(1.3981999507e-3f));
    y = multiply_add(y, rest, broadcast(8.3334519073e-3f));
    y = multiply_add(y, rest, broadcast(4.1665795894e-2f));
    y = multiply_add(y, rest, broadcast(1.6666665459e-1f));
    y = multiply_add(y, rest, broadcast(5.0000001201e-1f));
    y = add(multiply_add(multiply(y, rest), rest, rest), broadcast(1.0f));
    return where_less(x, lowest, zero(), multiply(y, power_of_two(n)));
}

inline float to_float(float x) { return x; }
inline float to_float(uint16_t bf16) {
    const uint32_t bits = static_cast<uint32_t>(bf16) << 16;
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}

inline void put(float* to, float x) { *to = x; }
inline void put(uint16_t* to, float x) {  // to the nearest bf16, ties to even; NaN stays NaN
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
    *to = static_cast<uint16_t>(is_nan ? (bits >> 16) | 0x40u : (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

// sums + bias, if there is one, rounded. The sums are overwritten.
template <typename T>
void put_row(T* to, float* sums, const T* bias, int64_t count) {
    if (bias)
        for (int64_t i = 0; i < count; ++i) sums[i] += to_float(bias[i]);
    int64_t i = 0;
#if defined(__AVX512BF16__)
    if constexpr (sizeof(T) == 2)
        for (; i + kLanes <= count; i += kLanes)
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i), (__m256i)_mm512_cvtneps_pbh(load(sums + i)));
#endif
    for (; i < count; ++i) put(to + i, sums[i]);
}

}  // namespace echelon
