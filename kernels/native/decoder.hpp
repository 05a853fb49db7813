// A forward of a decoder in one call.
//
// It calls the kernels of this folder in the order of workers/models/decoder.py, on the same rows, so its bits are those
// of the operators called one by one. What it saves is what Python and torch need around each of them, 20 to 60 us,
// which is more than the products of a small draft take.

#pragma once

#include "attention.hpp"
#include "rows.hpp"

namespace echelon {

// These structs are laid out as in kernels/native/decoder.py. T is the model's type.

template <typename T>
struct Linear {
    void (*multiply)(Pool* pool, const T* x, int64_t num_rows, int64_t x_stride, const T* packed, int64_t num_out,
                     int64_t num_in, const T* bias, T* y);
    const T* packed;  // or, for a product of quantized.cpp, its PackedCodes
    int64_t num_out, num_in;
    const T* bias;        // is added to the sums before they are rounded, or null
    const T* later_bias;  // is added to the rounded sums, or null
};

template <typename T>
struct Layer {
    const T* input_norm;
    const T *q_norm, *k_norm;  // null if the model has none
    const T* mlp_norm;
    Linear<T> qkv, output, gate_up, down;
    int64_t window;  // 0: none
};

template <typename T>
struct Model {
    const Layer<T>* layers;
    const T* embedding;    // [vocab_size, hidden_size]
    const float* cos_sin;  // [num_positions, head_dim]: cosines, then sines
    const T* norm;
    Linear<T> head;
    int64_t num_layers, vocab_size, num_positions, hidden_size, num_q_heads, num_kv_heads, head_dim;
    float eps, scale;
};

struct Batch {  // of workers/models/batch.py
    const int64_t *input_ids, *positions, *slots;
    const int32_t *block_table, *seq_lens, *cu_seqlens;
    int64_t num_tokens, num_seqs, max_blocks;
};

struct Caches {
    void* const* tensors;  // keys and values of each layer in turn: [num_blocks, block_size, num_kv_heads, head_dim]
    int64_t num_blocks, block_size;
};

inline bool is_below(int64_t number, int64_t end) { return 0 <= number && number < end; }

// What would make a forward leave its arrays, or null.
template <typename T>
const char* problem(const Model<T>& model, const Batch& batch, const Caches& caches) {
    for (int64_t token = 0; token < batch.num_tokens; ++token) {
        if (!is_below(batch.input_ids[token], model.vocab_size)) return "input_ids: a token is not in the vocabulary";
        if (!is_below(batch.positions[token], model.num_positions)) return "positions: one is beyond the model's last";
        if (!is_below(batch.slots[token] + 1, caches.num_blocks * caches.block_size + 1))
            return "slot_mapping: a slot is not in the cache";
    }
    if (batch.cu_seqlens[0] != 0 || batch.cu_seqlens[batch.num_seqs] != batch.num_tokens)
        return "cu_seqlens_q: does not run from 0 to the number of tokens";
    for (int64_t seq = 0; seq < batch.num_seqs; ++seq) {
        const int64_t length = batch.seq_lens[seq], num_new = batch.cu_seqlens[seq + 1] - batch.cu_seqlens[seq];
        if (!is_below(num_new, length + 1)) return "seq_lens: a seq has more new tokens than tokens";
        if (num_new == 0) continue;
        if (length > batch.max_blocks * caches.block_size) return "block_table: a seq has more tokens than its blocks";
        for (int64_t block = 0; block * caches.block_size < length; ++block)
            if (!is_below(batch.block_table[seq * batch.max_blocks + block], caches.num_blocks))
                return "block_table: a block is not in the cache";
    }
    return nullptr;
}

// Parts of one piece of memory, each at a cache line.
class Parts {
  public:
    explicit Parts(char* memory) : memory_(memory) {}

    template <typename T>
    T* take(int64_t count) {
        T* const part = reinterpret_cast<T*>(memory_ + num_bytes_);
        num_bytes_ += (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
        return part;
    }
    int64_t num_bytes() const { return num_bytes_; }

  private:
    char* memory_;
    int64_t num_bytes_ = 0;
};

// What a forward of some tokens writes on the way: a row for each token.
template <typename T>
struct Scratch {
    T *stream, *branch, *normed, *qkv, *q, *k, *attended, *gate_up, *inner;
    float* rotary;

    Scratch(const Model<T>& model, int64_t num_tokens, Parts& parts) {
        const Layer<T>& layer = model.layers[0];
        const auto rows = [&](int64_t size) { return parts.take<T>(num_tokens * size); };
        stream = rows(model.hidden_size);
        branch = rows(model.hidden_size);
        normed = rows(model.hidden_size);
        qkv = rows(layer.qkv.num_out);
        q = rows(layer.q_norm ? model.num_q_heads * model.head_dim : 0);
        k = rows(layer.k_norm ? model.num_kv_heads * model.head_dim : 0);
        attended = rows(layer.output.num_in);
        gate_up = rows(layer.gate_up.num_out);
        inner = rows(layer.down.num_in);
        rotary = parts.take<float>(num_tokens * model.head_dim);
    }
};

template <typename T>
void multiply(Pool& pool, const Linear<T>& linear, const T* x, int64_t num_rows, T* y) {
    linear.multiply(&pool, x, num_rows, linear.num_in, linear.packed, linear.num_out, linear.num_in, linear.bias, y);
    if (!linear.later_bias) return;
    for (int64_t row = 0; row < num_rows; ++row)
        add_to<T>(y + row * linear.num_out, linear.later_bias, linear.num_out);
}

template <typename T>
class Forward {
  public:
    Forward(Pool& pool, const Model<T>& model, const Batch& batch, const Caches& caches, const Scratch<T>& scratch)
        : pool_(pool), model_(model), batch_(batch), caches_(caches), at_(scratch) {}

    // out: [num_tokens, hidden_size]
    void run(T* out) const {
        look_up();
        for (int64_t index = 0; index < model_.num_layers; ++index) {
            const Layer<T>& layer = model_.layers[index];
            norm(layer.input_norm, index > 0, at_.normed);
            attend(layer, index);
            norm(layer.mlp_norm, true, at_.normed);
            multiply(layer.gate_up, at_.normed, at_.gate_up);
            silu_and_mul_rows<T>(pool_, at_.gate_up, at_.inner, batch_.num_tokens, layer.down.num_in,
                                 layer.gate_up.num_out);
            multiply(layer.down, at_.inner, at_.branch);
        }
        norm(model_.norm, true, out);
    }

  private:
    // Embeddings and rotation factors.
    void look_up() const {
        for (int64_t token = 0; token < batch_.num_tokens; ++token) {
            const int64_t hidden = model_.hidden_size, dim = model_.head_dim;
            std::copy_n(model_.embedding + batch_.input_ids[token] * hidden, hidden,
                        at_.stream + token * hidden);
            std::copy_n(model_.cos_sin + batch_.positions[token] * dim, dim, at_.rotary + token * dim);
        }
    }

    // Of the stream, to which the last sublayer's output is added first.
    void norm(const T* weight, bool adds, T* out) const {
        const int64_t hidden = model_.hidden_size;
        const Rows<T> stream{at_.stream, 1, hidden, 0}, branch{at_.branch, 1, hidden, 0}, nothing{};
        rms_norm_rows<T>(pool_, adds ? branch : stream, adds ? stream : nothing, weight, out,
                         batch_.num_tokens, hidden, model_.eps);
    }

    void multiply(const Linear<T>& linear, const T* x, T* y) const {
        echelon::multiply(pool_, linear, x, batch_.num_tokens, y);
    }

    void attend(const Layer<T>& layer, int64_t index) const {
        multiply(layer.qkv, at_.normed, at_.qkv);
        const int64_t num_q = model_.num_q_heads, num_kv = model_.num_kv_heads, dim = model_.head_dim;
        const int64_t stride = layer.qkv.num_out, q_size = num_q * dim, kv_size = num_kv * dim;
        Rows<T> q{at_.qkv, num_q, stride, dim}, k{at_.qkv + q_size, num_kv, stride, dim};
        const Rows<T> v{at_.qkv + q_size + kv_size, num_kv, stride, dim};
        if (layer.q_norm && layer.k_norm) {
            q = norm_heads(q, layer.q_norm, at_.q);
            k = norm_heads(k, layer.k_norm, at_.k);
        }
        T* const k_cache = static_cast<T*>(caches_.tensors[2 * index]);
        T* const v_cache = static_cast<T*>(caches_.tensors[2 * index + 1]);
        rotate_and_cache<T>(pool_, batch_.num_tokens, {num_q, num_kv, dim, dim / 2}, q, k, v, at_.rotary, dim, 0,
                            batch_.slots, k_cache, v_cache);
        const AttentionShape shape{batch_.num_seqs, caches_.block_size, num_kv,         num_q / num_kv,    dim,
                                   layer.window,    q.outer_stride,     q.inner_stride, batch_.max_blocks, model_.scale};
        echelon::attend<T>(pool_, shape, {q.data, k_cache, v_cache, batch_.block_table, batch_.seq_lens,
                                          batch_.cu_seqlens, at_.attended});
        multiply(layer.output, at_.attended, at_.branch);
    }

    Rows<T> norm_heads(const Rows<T>& heads, const T* weight, T* out) const {
        const int64_t num_heads = heads.num_inner, dim = model_.head_dim;
        rms_norm_rows<T>(pool_, heads, {}, weight, out, batch_.num_tokens * num_heads, dim, model_.eps);
        return {out, num_heads, num_heads * dim, dim};
    }

    Pool& pool_;
    const Model<T>& model_;
    const Batch& batch_;
    const Caches& caches_;
    const Scratch<T>& at_;
};

}  // namespace echelon
