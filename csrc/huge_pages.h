// Operands in huge pages, whose cache lines do not push each other out.
//
// A second-level cache finds its lines by physical address. A packed operand that nearly fills it, in pages of 4 KiB
// that lie anywhere, loses part of itself to itself: on some runs of a program a quarter of the time went there.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace tbrm {

struct Free {
  void operator()(void* data) const { std::free(data); }
};

template <typename T>
using Buffer = std::unique_ptr<T[], Free>;

// Uninitialised; whole huge pages if it would fill a good part of one.
template <typename T>
Buffer<T> make_buffer(int64_t count) {
  constexpr size_t huge = 2 << 20, line = 64;
  const size_t wanted = count * sizeof(T), alignment = wanted < huge / 4 ? line : huge;
  const size_t bytes = (wanted + alignment - 1) / alignment * alignment;
  void* data = std::aligned_alloc(alignment, bytes);
  if (!data && bytes > 0) throw std::bad_alloc();
#ifdef __linux__
  if (alignment == huge) madvise(data, bytes, MADV_HUGEPAGE);  // a hint: it may fail
#endif
  return Buffer<T>(static_cast<T*>(data));
}

}  // namespace tbrm
