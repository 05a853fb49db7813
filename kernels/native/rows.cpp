// Calls of rows.hpp.

#include "rows.hpp"

using echelon::Pool;

extern "C" {

#define ECHELON_ROWS(name, T)                                                                                        \
    void echelon_rms_norm_##name(Pool* pool, T* x, T* residual, const T* weight, T* out, int64_t num_rows,           \
                                 int64_t num_inner, int64_t size, int64_t x_outer, int64_t x_inner,                  \
                                 int64_t residual_outer, int64_t residual_inner, float eps) {                        \
        echelon::rms_norm_rows<T>(*pool, {x, num_inner, x_outer, x_inner},                                           \
                                  {residual, num_inner, residual_outer, residual_inner}, weight, out, num_rows,      \
                                  size, eps);                                                                        \
    }                                                                                                                \
    void echelon_silu_and_mul_##name(Pool* pool, const T* gate_up, T* out, int64_t num_rows, int64_t size,           \
                                     int64_t stride) {                                                               \
        echelon::silu_and_mul_rows<T>(*pool, gate_up, out, num_rows, size, stride);                                  \
    }                                                                                                                \
    void echelon_rotate_and_cache_##name(Pool* pool, T* q, T* k, T* v, const float* cos, const int64_t* slots,       \
                                         T* k_cache, T* v_cache, int64_t num_tokens, int64_t num_q, int64_t num_kv,  \
                                         int64_t head_dim, int64_t half, int64_t q_token, int64_t q_head,            \
                                         int64_t k_token, int64_t k_head, int64_t v_token, int64_t v_head,           \
                                         int64_t cos_stride, int64_t sin_offset) {                                   \
        echelon::rotate_and_cache<T>(*pool, num_tokens, {num_q, num_kv, head_dim, half}, {q, num_q, q_token, q_head}, \
                                     {k, num_kv, k_token, k_head}, {v, num_kv, v_token, v_head}, cos, cos_stride,    \
                                     sin_offset, slots, k_cache, v_cache);                                           \
    }

ECHELON_ROWS(float32, float)
ECHELON_ROWS(bfloat16, uint16_t)

}  // extern "C"
