// Calls of decoder.hpp: a forward, the choice of tokens after it, and both in turn for a chain of drafts.

#include <vector>

#include "decoder.hpp"
#include "sampling.hpp"

namespace echelon {
namespace {

// The seqs of a draft step, which computes a token of each.
struct Seqs {
    const int32_t* block_table;
    int64_t num_seqs, max_blocks;
};

// What a step of drafting writes on the way.
template <typename T>
struct DraftScratch {
    Scratch<T> forward;
    T* logits;

    DraftScratch(const Model<T>& model, int64_t num_seqs, Parts& parts)
        : forward(model, num_seqs, parts), logits(parts.take<T>(num_seqs * model.head.num_out)) {}
};

// The tokens after rows of hidden states.
template <typename T>
void choose_tokens(Pool& pool, const Model<T>& model, const T* hidden, int64_t num_rows, const RowSettings* rows,
                   T* logits, const Chosen& to) {
    const int64_t vocab_size = model.head.num_out;
    multiply(pool, model.head, hidden, num_rows, logits);
    choose<T>(pool, logits, num_rows, vocab_size, vocab_size, 0, rows, to);
}

template <typename T>
class Chains {
  public:
    Chains(Pool& pool, const Model<T>& model, const Seqs& seqs, const Caches& caches, Parts scratch)
        : pool_(pool), model_(model), seqs_(seqs), caches_(caches), at_(model, seqs.num_seqs, scratch),
          input_ids_(size()), positions_(size()), slots_(size()), seq_lens_(size()), cu_seqlens_(size() + 1) {
        for (size_t seq = 0; seq <= size(); ++seq) cu_seqlens_[seq] = static_cast<int32_t>(seq);
    }

    // Chooses a token after each seq, computes it, and so on. `hidden` [num_seqs, hidden_size] are the states of their
    // last tokens, and then of the last tokens that were computed; `rows` say what decides the next token. Ends early
    // after a step in which logits were not finite. Returns what is wrong with the arguments, or null.
    const char* grow(T* hidden, RowSettings* rows, int64_t num_steps, Chosen to, int64_t* num_made) {
        for (*num_made = 0;;) {
            choose_tokens<T>(pool_, model_, hidden, seqs_.num_seqs, rows, at_.logits, to);
            if (++*num_made == num_steps || !std::all_of(to.is_finite, to.is_finite + size(), [](bool is) { return is; }))
                return nullptr;
            append(rows, to);
            const Batch batch{input_ids_.data(), positions_.data(),  slots_.data(),  seqs_.block_table, seq_lens_.data(),
                              cu_seqlens_.data(), seqs_.num_seqs, seqs_.num_seqs, seqs_.max_blocks};
            if (const char* const found = problem(model_, batch, caches_)) return found;
            Forward<T>(pool_, model_, batch, caches_, at_.forward).run(hidden);
            to = after(to);
        }
    }

  private:
    size_t size() const { return static_cast<size_t>(seqs_.num_seqs); }

    // The chosen tokens are the inputs of the next forward.
    void append(RowSettings* rows, const Chosen& chosen) {
        for (size_t seq = 0; seq < size(); ++seq) {
            const int64_t position = rows[seq].position++, block = position / caches_.block_size;
            input_ids_[seq] = chosen.token_ids[static_cast<int64_t>(seq) * chosen.num_best];
            positions_[seq] = position;
            const int64_t place = std::min(block, seqs_.max_blocks - 1);  // if there are too few, `problem` will say so
            slots_[seq] = seqs_.block_table[static_cast<int64_t>(seq) * seqs_.max_blocks + place] * caches_.block_size +
                          position % caches_.block_size;
            seq_lens_[seq] = static_cast<int32_t>(position + 1);
        }
    }

    // Where the choices of the next step go.
    Chosen after(Chosen to) const {
        to.token_ids += seqs_.num_seqs * to.num_best;
        to.values += seqs_.num_seqs * to.num_best;
        to.is_finite += seqs_.num_seqs;
        if (to.confidences) to.confidences += seqs_.num_seqs;
        return to;
    }

    Pool& pool_;
    const Model<T>& model_;
    const Seqs seqs_;
    const Caches& caches_;
    const DraftScratch<T> at_;
    std::vector<int64_t> input_ids_, positions_, slots_;
    std::vector<int32_t> seq_lens_, cu_seqlens_;
};

// What a call with an empty piece of memory would take from it.
template <typename Scratch, typename T>
int64_t bytes_of(const Model<T>& model, int64_t num_rows) {
    Parts parts(nullptr);
    const Scratch scratch(model, num_rows, parts);
    return parts.num_bytes();
}

}  // namespace
}  // namespace echelon

extern "C" {

// `forward` and `draft` return what is wrong with the arguments, or null. `forward` writes nothing in that case.
#define ECHELON_DECODER(name, T)                                                                                     \
    int64_t echelon_decoder_forward_bytes_##name(const echelon::Model<T>* model, int64_t num_tokens) {               \
        return echelon::bytes_of<echelon::Scratch<T>>(*model, num_tokens);                                           \
    }                                                                                                                \
    int64_t echelon_decoder_draft_bytes_##name(const echelon::Model<T>* model, int64_t num_seqs) {                   \
        return echelon::bytes_of<echelon::DraftScratch<T>>(*model, num_seqs);                                        \
    }                                                                                                                \
    const char* echelon_decoder_forward_##name(echelon::Pool* pool, const echelon::Model<T>* model,                  \
                                               const echelon::Batch* batch, const echelon::Caches* caches,           \
                                               char* memory, T* out) {                                               \
        if (const char* const found = echelon::problem<T>(*model, *batch, *caches)) return found;                    \
        echelon::Parts parts(memory);                                                                                \
        const echelon::Scratch<T> scratch(*model, batch->num_tokens, parts);                                         \
        echelon::Forward<T>(*pool, *model, *batch, *caches, scratch).run(out);                                       \
        return nullptr;                                                                                              \
    }                                                                                                                \
    void echelon_decoder_choose_##name(echelon::Pool* pool, const echelon::Model<T>* model, const T* hidden,         \
                                       int64_t num_rows, const echelon::RowSettings* rows, T* logits,                \
                                       const echelon::Chosen* chosen) {                                              \
        echelon::choose_tokens<T>(*pool, *model, hidden, num_rows, rows, logits, *chosen);                           \
    }                                                                                                                \
    const char* echelon_decoder_draft_##name(echelon::Pool* pool, const echelon::Model<T>* model,                    \
                                             const echelon::Seqs* seqs, const echelon::Caches* caches, char* memory, \
                                             T* hidden, echelon::RowSettings* rows, int64_t num_steps,               \
                                             const echelon::Chosen* chosen, int64_t* num_made) {                     \
        return echelon::Chains<T>(*pool, *model, *seqs, *caches, echelon::Parts(memory))                             \
            .grow(hidden, rows, num_steps, *chosen, num_made);                                                       \
    }

ECHELON_DECODER(float32, float)
ECHELON_DECODER(bfloat16, uint16_t)

}  // extern "C"
