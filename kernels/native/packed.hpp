// The operands of products: weights in panels, and rows of inputs.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "pool.hpp"

namespace echelon {

constexpr int kPanel = 16;           // outputs
constexpr int kPanelsTogether = 4;   // a weight has a multiple of as many
constexpr int kInputsTogether = 32;  // likewise
constexpr int kMostPanelsOfChunk = 16;

constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// With zeros in the place of weights and inputs that do not exist.
constexpr int64_t padded_panels(int64_t num_out) {
    return divide_up(num_out, kPanel * kPanelsTogether) * kPanelsTogether;
}
constexpr int64_t padded_inputs(int64_t num_in) { return divide_up(num_in, kInputsTogether) * kInputsTogether; }

// Panels that a thread computes at a time: small enough that all threads find work until the end.
inline int64_t panels_of_chunk(int64_t num_panels, int num_threads) {
    const int64_t share = num_panels / (4 * num_threads) / kPanelsTogether * kPanelsTogether;
    return std::clamp<int64_t>(share, kPanelsTogether, kMostPanelsOfChunk);
}

// Move memory that is read from end to end into pages of 2 MiB, if Linux has them: an AMD EPYC reads it a fifth faster,
// because prefetching does not stop at every 4 KiB.
inline void use_huge_pages([[maybe_unused]] void* memory, [[maybe_unused]] int64_t num_bytes) {
#if defined(MADV_HUGEPAGE)
    constexpr uintptr_t kPage = 2 << 20;
    constexpr int kCollapse = 25;  // MADV_COLLAPSE, which older headers lack
    const uintptr_t begin = reinterpret_cast<uintptr_t>(memory), first = (begin + kPage - 1) / kPage * kPage;
    const uintptr_t end = (begin + static_cast<uintptr_t>(num_bytes)) / kPage * kPage;
    if (first >= end) return;
    madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);
    madvise(reinterpret_cast<void*>(first), end - first, kCollapse);  // at once; a kernel that cannot refuses
#endif
}

// Rows of inputs as a product reads them. They begin at cache lines, an odd number of lines apart: adjacent rows do not
// compete for places in caches.
template <typename Input>
class InputRows {
  public:
    // convert(row, to) writes a row's inputs; those after it, up to `num_inputs`, are zero.
    template <typename Convert>
    InputRows(Pool& pool, int64_t num_rows, int64_t num_inputs, const Convert& convert)
        : row_lines_(divide_up(num_inputs * sizeof(Input), sizeof(Line)) | 1),
          lines_(new Line[static_cast<size_t>(num_rows * row_lines_)]) {
        const auto fill = [&](int64_t row) {
            Input* const to = reinterpret_cast<Input*>(&lines_[row * row_lines_]);
            std::fill_n(to, num_inputs, Input{0});
            convert(row, to);
        };
        if (num_rows > kRowsToConvertAlone)
            pool.run(num_rows, fill);
        else
            for (int64_t row = 0; row < num_rows; ++row) fill(row);
    }

    const Input* at(int64_t row) const { return reinterpret_cast<const Input*>(&lines_[row * row_lines_]); }
    int64_t stride() const { return row_lines_ * static_cast<int64_t>(sizeof(Line) / sizeof(Input)); }

  private:
    static constexpr int64_t kRowsToConvertAlone = 16;
    struct alignas(64) Line {
        char bytes[64];
    };

    int64_t row_lines_;
    std::unique_ptr<Line[]> lines_;
};

}  // namespace echelon
