// A few rows through their adapters, all adapters of a batch in one call:  y[row] += scale * B (A x[row]).
//
// A decode step has hundreds of products so small that PyTorch spends more time on arranging them than the processor
// on computing them. Matrices are bfloat16 in pairs: a word holds rows 2p (low half) and 2p + 1 of a column, as the
// processor's dot product takes them. Columns lie in strips of 64, the words of a strip one after the other, so that
// memory is read in order. Without AVX512-BF16 the same loops are left to the compiler.
//
//   layer: pairs, slices, the slices' sizes, then for each slot: A, its columns, then for each slice: B, its pairs
//   step:  tiles, then for each tile: its slot, how many rows (1 to 4), which

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>
#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif
#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "the low half of a word must come first"
#endif

namespace {

constexpr int64_t kLanes = 16, kStrip = 64, kRows = 4;
// words of weights from which a call is shared out to threads
constexpr int64_t kShared = 1 << 16;

struct Tile {
  int64_t slot, count, rows[kRows];
};

struct Layer {
  const int64_t* at;
  int64_t pairs() const { return at[0]; }
  int64_t slices() const { return at[1]; }
  int64_t size(int64_t slice) const { return at[2 + slice]; }
  const int64_t* slot(int64_t number) const { return at + 2 + slices() + number * (2 + 2 * slices()); }
};

inline int64_t strips(int64_t columns) { return (columns + kStrip - 1) / kStrip; }

inline uint32_t word(const uint16_t* row, int64_t pair) {
  uint32_t both;
  std::memcpy(&both, row + 2 * pair, sizeof both);
  return both;
}

inline float from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline float wide(uint16_t value) { return from_bits(uint32_t(value) << 16); }

// to the nearest bfloat16, ties to even; what is no number stays none
inline uint16_t narrow(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const uint32_t near = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return uint16_t((bits & 0x7fffffffu) > 0x7f800000u ? (bits >> 16) | 64u : near);
}

// out[r][j] = sum over pairs of the two products, for R rows and C * 16 columns
template <int R, int C>
void product(const uint32_t* words, int64_t pairs, const uint16_t* const* rows, float (*out)[kStrip]) {
#if defined(__AVX512BF16__)
  __m512 sum[R][C];
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c) sum[r][c] = _mm512_setzero_ps();
  for (int64_t p = 0; p < pairs; ++p, words += C * kLanes) {
    __m512i column[C];
    for (int c = 0; c < C; ++c) column[c] = _mm512_loadu_si512(words + c * kLanes);
    for (int r = 0; r < R; ++r) {
      const __m512i both = _mm512_set1_epi32(int(word(rows[r], p)));
      for (int c = 0; c < C; ++c) sum[r][c] = _mm512_dpbf16_ps(sum[r][c], (__m512bh)column[c], (__m512bh)both);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c) _mm512_storeu_ps(out[r] + c * kLanes, sum[r][c]);
#else
  float sum[R][C * kLanes] = {};
  for (int64_t p = 0; p < pairs; ++p, words += C * kLanes)
    for (int r = 0; r < R; ++r) {
      const uint32_t both = word(rows[r], p);
      const float low = from_bits(both << 16), high = from_bits(both & 0xffff0000u);
      for (int j = 0; j < C * kLanes; ++j)
        sum[r][j] += low * from_bits(words[j] << 16) + high * from_bits(words[j] & 0xffff0000u);
    }
  for (int r = 0; r < R; ++r) std::copy(sum[r], sum[r] + C * kLanes, out[r]);
#endif
}

template <int R>
void strip(int64_t width, const uint32_t* words, int64_t pairs, const uint16_t* const* rows, float (*out)[kStrip]) {
  switch (width / kLanes) {
    case 1: return product<R, 1>(words, pairs, rows, out);
    case 2: return product<R, 2>(words, pairs, rows, out);
    case 3: return product<R, 3>(words, pairs, rows, out);
    default: return product<R, 4>(words, pairs, rows, out);
  }
}

void multiply(int64_t count, int64_t width, int64_t words, int64_t offset, int64_t pairs, const uint16_t* const* rows,
              float (*out)[kStrip]) {
  const uint32_t* first = reinterpret_cast<const uint32_t*>(words) + offset;
  switch (count) {
    case 1: return strip<1>(width, first, pairs, rows, out);
    case 2: return strip<2>(width, first, pairs, rows, out);
    case 3: return strip<3>(width, first, pairs, rows, out);
    default: return strip<4>(width, first, pairs, rows, out);
  }
}

}  // namespace

extern "C" void hybrid_lora_few(const int64_t* layer_, const int64_t* step, const uint16_t* x, int64_t x_stride,
                                uint16_t* y, int64_t y_stride, float scale) {
  const Layer layer{layer_};
  const int64_t tiles = step[0];
  const Tile* tile = reinterpret_cast<const Tile*>(step + 1);
  int64_t widest = 0, across = 0, size = 0;
  for (int64_t t = 0; t < tiles; ++t) widest = std::max(widest, layer.slot(tile[t].slot)[1]);
  for (int64_t i = 0; i < layer.slices(); ++i) across += strips(layer.size(i)), size += layer.size(i);
  if (widest == 0) return;

  static thread_local std::vector<uint16_t> space;
  space.resize(size_t(tiles * kRows * widest));
  uint16_t* hidden = space.data();

  const int64_t ranks = strips(widest);
#pragma omp parallel for schedule(static) if (tiles * widest * layer.pairs() > kShared)
  for (int64_t i = 0; i < tiles * ranks; ++i) {
    const Tile& own = tile[i / ranks];
    const int64_t* slot = layer.slot(own.slot);
    const int64_t start = i % ranks * kStrip, width = std::min(slot[1] - start, kStrip);
    if (width <= 0) continue;
    const uint16_t* rows[kRows];
    float out[kRows][kStrip];
    for (int64_t r = 0; r < own.count; ++r) rows[r] = x + own.rows[r] * x_stride;
    multiply(own.count, width, slot[0], layer.pairs() * start, layer.pairs(), rows, out);
    for (int64_t r = 0; r < own.count; ++r) {
      uint16_t* to = hidden + (i / ranks * kRows + r) * widest + start;
      for (int64_t j = 0; j < width; ++j) to[j] = narrow(out[r][j]);
    }
  }

#pragma omp parallel for schedule(static) if (tiles * widest / 2 * size > kShared)
  for (int64_t i = 0; i < tiles * across; ++i) {
    const Tile& own = tile[i / across];
    const int64_t* slot = layer.slot(own.slot);
    int64_t slice = 0, start = i % across, from = 0, to = 0;
    for (; start >= strips(layer.size(slice)); ++slice) {
      start -= strips(layer.size(slice));
      from += 2 * slot[3 + 2 * slice];
      to += layer.size(slice);
    }
    const int64_t pairs = slot[3 + 2 * slice], columns = layer.size(slice);
    if (pairs == 0) continue;
    start *= kStrip;
    const int64_t filled = (columns + kLanes - 1) / kLanes * kLanes;
    const uint16_t* rows[kRows];
    float out[kRows][kStrip];
    for (int64_t r = 0; r < own.count; ++r) rows[r] = hidden + (i / across * kRows + r) * widest + from;
    multiply(own.count, std::min(filled - start, kStrip), slot[2 + 2 * slice], pairs * start, pairs, rows, out);
    for (int64_t r = 0; r < own.count; ++r) {
      uint16_t* end = y + own.rows[r] * y_stride + to + start;
      const int64_t width = std::min(columns - start, kStrip);
      for (int64_t j = 0; j < width; ++j) end[j] = narrow(wide(end[j]) + scale * out[r][j]);
    }
  }
}
