/* Pillow's bicubic resize and a centre crop: the same bytes, but only the pixels of the crop are computed.

   The arithmetic is Pillow's (src/libImaging/Resample.c). Each axis has its own coefficients, computed in doubles and
   rounded to 22 bits. Each pass sums in 32 bits and rounds to 8, so the order of the two passes affects the result. Within
   a pass the sums are integers, so their order does not matter. clip_resample.py loads the library and calls it.

   Build with -ffp-contract=off (tools/clip_tools/c_libraries.py does): fused operations give other coefficients. */

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#define HAS_AVX2_FORM 1
#endif

enum { DONE = 0, BAD_ARGUMENTS = 1, NO_MEMORY = 2 };
enum { PORTABLE = 0, AVX2 = 1 };
/* How the image is turned before the resize: columns or rows mirrored, sides swapped. No pixels are moved: the windows are
   mirrored instead, and the passes run in the order of the turned image. */
enum { MIRRORED_COLUMNS = 1, MIRRORED_ROWS = 2, SIDEWAYS = 4, TURNS = 8 };

#define BITS 22
#define HALF (1 << (BITS - 1))
/* A coefficient is HIGH * 2^15 + LOW, because AVX2 multiplies and adds pairs of 16 bits: LOW in 0..32767, HIGH signed. */
#define LOW_BITS 15
#define MAX_SIDE 4096
#define MAX_LENGTH ((1 << 29) - 2) /* of an axis: Pillow's limit */

/* https://arrow.apache.org/docs/format/CDataInterface.html: how Pillow exports its pixels. */
struct ArrowArray {
    int64_t length, null_count, offset, n_buffers, n_children;
    const void **buffers;
    struct ArrowArray **children;
    struct ArrowArray *dictionary;
    void (*release)(struct ArrowArray *);
    void *private_data;
};

/* The source pixels for each kept pixel of an axis: `count` windows of `taps[i]` pixels from `first[i]` on. The coefficients
   of window i begin at i * stride: complete in `whole`, split in `low` and `high`. */
struct axis {
    int32_t count, stride, begin, end; /* begin..end spans all windows */
    int32_t *first, *taps, *whole;
    int16_t *low, *high;
    double *weights;
};

/* Rows of bytes. */
struct plane {
    const uint8_t *pixels;
    size_t stride;
};

static double bicubic(double x) {
    x = x < 0 ? -x : x;
    if (x < 1) {
        return (1.5 * x - 2.5) * x * x + 1;
    }
    return x < 2 ? (((x - 5) * x + 8) * x - 4) * -0.5 : 0;
}

static size_t round_up(size_t number, size_t multiple) { return (number + multiple - 1) / multiple * multiple; }

static void free_axis(struct axis *axis) {
    free(axis->first);
    free(axis->taps);
    free(axis->whole);
    free(axis->low);
    free(axis->high);
    free(axis->weights);
}

/* Fills `axis` with the windows of pixels kept..kept + count, when the first `box` of its `length` pixels are resized to
   `resized`. For a mirrored axis both count from its far end, and the windows are in memory order. */
static int make_axis(struct axis *axis, int32_t length, float box, int32_t resized, int32_t kept, int32_t count,
                     int is_mirrored) {
    const double scale = (double)box / resized;
    const double filter_scale = scale < 1 ? 1 : scale;
    const double support = 2.0 * filter_scale, inverse = 1.0 / filter_scale;
    const size_t stride = round_up((size_t)ceil(support) * 2 + 1, 16);
    memset(axis, 0, sizeof *axis);
    axis->count = count;
    axis->stride = (int32_t)stride;
    axis->begin = length;
    axis->first = calloc(count, sizeof *axis->first);
    axis->taps = calloc(count, sizeof *axis->taps);
    axis->whole = calloc(count * stride, sizeof *axis->whole);
    axis->weights = malloc(stride * sizeof *axis->weights);
    if (!axis->first || !axis->taps || !axis->whole || !axis->weights) {
        return NO_MEMORY;
    }
    for (int32_t i = 0; i < count; i++) {
        const double center = (i + kept + 0.5) * scale;
        int32_t first = (int32_t)(center - support + 0.5), end = (int32_t)(center + support + 0.5);
        first = first < 0 ? 0 : first;
        end = end > length ? length : end;
        if (first >= end || (size_t)(end - first) > stride) {
            return BAD_ARGUMENTS;
        }
        double sum = 0;
        for (int32_t x = first; x < end; x++) {
            sum += axis->weights[x - first] = bicubic((x - center + 0.5) * inverse);
        }
        const int32_t taps = end - first, window = is_mirrored ? count - 1 - i : i;
        for (int32_t x = 0; x < taps; x++) {
            const double weight = sum != 0 ? axis->weights[x] / sum : axis->weights[x];
            axis->whole[window * stride + (is_mirrored ? taps - 1 - x : x)] =
                (int32_t)((weight < 0 ? -0.5 : 0.5) + weight * (1 << BITS));
        }
        first = is_mirrored ? length - end : first;
        axis->first[window] = first;
        axis->taps[window] = taps;
        axis->begin = first < axis->begin ? first : axis->begin;
        axis->end = first + taps > axis->end ? first + taps : axis->end;
    }
    return DONE;
}

static inline uint8_t rounded(int32_t sum) {
    const int32_t value = sum >> BITS;
    return (uint8_t)(value < 0 ? 0 : value > 255 ? 255 : value);
}

/* ---- Portable: loops that the compiler vectorises for the processor. ---- */

/* Resizes `rows` rows to `axis->count` pixels each. A pixel has 4 bytes or 1. */
static void across_portable(const struct axis *axis, struct plane in, int32_t rows, int32_t bands, uint8_t *out) {
    for (int32_t y = 0; y < rows; y++, in.pixels += in.stride) {
        for (int32_t i = 0; i < axis->count; i++, out += bands) {
            const uint8_t *pixel = in.pixels + (size_t)axis->first[i] * bands;
            const int32_t *whole = axis->whole + (size_t)i * axis->stride, taps = axis->taps[i];
            if (bands == 4) {
                int32_t sum[4] = {HALF, HALF, HALF, HALF};
                for (int32_t t = 0; t < taps; t++) {
                    for (int32_t band = 0; band < 4; band++) {
                        sum[band] += whole[t] * pixel[4 * t + band];
                    }
                }
                for (int32_t band = 0; band < 4; band++) {
                    out[band] = rounded(sum[band]);
                }
            } else {
                int32_t sum = HALF;
                for (int32_t t = 0; t < taps; t++) {
                    sum += whole[t] * pixel[t];
                }
                *out = rounded(sum);
            }
        }
    }
}

/* Resizes down to `axis->count` rows of `row_bytes` bytes. The first row of `in` is row `origin` of the axis. */
static void down_portable(const struct axis *axis, struct plane in, int32_t origin, size_t row_bytes, uint8_t *out) {
    enum { CHUNK = 128 };
    for (int32_t i = 0; i < axis->count; i++, out += row_bytes) {
        const uint8_t *rows = in.pixels + (size_t)(axis->first[i] - origin) * in.stride;
        const int32_t *whole = axis->whole + (size_t)i * axis->stride, taps = axis->taps[i];
        for (size_t x = 0; x < row_bytes; x += CHUNK) {
            const size_t width = row_bytes - x < CHUNK ? row_bytes - x : CHUNK;
            int32_t sum[CHUNK];
            for (size_t c = 0; c < width; c++) {
                sum[c] = HALF;
            }
            for (int32_t t = 0; t < taps; t++) {
                const uint8_t *row = rows + t * in.stride + x;
                for (size_t c = 0; c < width; c++) {
                    sum[c] += whole[t] * row[c];
                }
            }
            for (size_t c = 0; c < width; c++) {
                out[x + c] = rounded(sum[c]);
            }
        }
    }
}

/* ---- AVX2: two taps in one multiply-and-add, once for the low and once for the high part of the coefficients. Sums may
   wrap around at 32 bits, but the final sum fits and is right. ---- */

#if HAS_AVX2_FORM
#define WITH_AVX2 __attribute__((target("avx2")))

/* Pads every window with zero coefficients to a multiple of `group` taps, moves it left if it would pass the end of the
   axis, and splits the coefficients. The axis must be at least as long as the widest window. */
static int split_axis(struct axis *axis, int32_t length, int32_t group) {
    const size_t stride = axis->stride, size = axis->count * stride;
    axis->low = calloc(size, sizeof *axis->low);
    axis->high = calloc(size, sizeof *axis->high);
    if (!axis->low || !axis->high) {
        return NO_MEMORY;
    }
    for (int32_t i = 0; i < axis->count; i++) {
        const int32_t taps = (int32_t)round_up(axis->taps[i], group), beyond = axis->first[i] + taps - length;
        const int32_t moved = group > 2 && beyond > 0 ? beyond : 0;
        const int32_t *whole = axis->whole + i * stride;
        for (int32_t t = 0; t < axis->taps[i]; t++) {
            axis->low[i * stride + moved + t] = (int16_t)(whole[t] & ((1 << LOW_BITS) - 1));
            axis->high[i * stride + moved + t] = (int16_t)(whole[t] >> LOW_BITS);
        }
        if (group > 2) { /* rows only: down_avx2 handles an odd last tap */
            axis->first[i] -= moved;
            axis->taps[i] = taps;
        }
    }
    return DONE;
}

static int fits_avx2(const struct axis *axis, int32_t length, int32_t group) {
    for (int32_t i = 0; i < axis->count; i++) {
        if ((int32_t)round_up(axis->taps[i], group) > length) {
            return 0;
        }
    }
    return 1;
}

/* Two consecutive coefficients in every pair of 16-bit lanes. */
WITH_AVX2 static inline __m256i pair_of(const int16_t *coefficients) {
    int32_t both;
    memcpy(&both, coefficients, sizeof both);
    return _mm256_set1_epi32(both);
}

WITH_AVX2 static inline __m256i total(__m256i low, __m256i high) {
    return _mm256_add_epi32(_mm256_add_epi32(low, _mm256_set1_epi32(HALF)), _mm256_slli_epi32(high, LOW_BITS));
}

WITH_AVX2 static inline __m256i two_rows(const uint8_t *first, const uint8_t *second) {
    const __m128i low = _mm_loadu_si128((const __m128i *)first), high = _mm_loadu_si128((const __m128i *)second);
    return _mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1);
}

WITH_AVX2 static inline void store_pixel(uint8_t *out, __m128i bytes) {
    const int32_t pixel = _mm_cvtsi128_si32(bytes);
    memcpy(out, &pixel, sizeof pixel);
}

/* Like across_portable, for pixels of 4 bytes: four rows and four taps at a time. */
WITH_AVX2 static void across4_avx2(const struct axis *axis, struct plane in, int32_t rows, uint8_t *out) {
    const size_t out_stride = 4 * (size_t)axis->count;
    /* Interleave the bands of two pixels and widen them to 16 bits: the first two of four pixels, and the last two. */
    const __m256i front = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(0, -1, 4, -1, 1, -1, 5, -1, 2, -1, 6, -1, 3, -1, 7, -1));
    const __m256i back = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(8, -1, 12, -1, 9, -1, 13, -1, 10, -1, 14, -1, 11, -1, 15, -1));
    for (int32_t y = 0; y < rows; y += 4) {
        size_t row[4]; /* repeats the last row if fewer than four are left */
        for (int32_t r = 0; r < 4; r++) {
            row[r] = y + r < rows ? y + r : rows - 1;
        }
        for (int32_t i = 0; i < axis->count; i++) {
            const uint8_t *pixel = in.pixels + 4 * (size_t)axis->first[i];
            const uint8_t *a = pixel + row[0] * in.stride, *b = pixel + row[1] * in.stride;
            const uint8_t *c = pixel + row[2] * in.stride, *d = pixel + row[3] * in.stride;
            const int16_t *low = axis->low + (size_t)i * axis->stride, *high = axis->high + (size_t)i * axis->stride;
            __m256i low_ab = _mm256_setzero_si256(), high_ab = low_ab, low_cd = low_ab, high_cd = low_ab;
            for (int32_t t = 0; t < axis->taps[i]; t += 4) {
                const __m256i ab = two_rows(a + 4 * t, b + 4 * t), cd = two_rows(c + 4 * t, d + 4 * t);
                for (int32_t half = 0; half < 2; half++) {
                    const __m256i order = half ? back : front;
                    const __m256i low_pair = pair_of(low + t + 2 * half), high_pair = pair_of(high + t + 2 * half);
                    const __m256i ab_pair = _mm256_shuffle_epi8(ab, order), cd_pair = _mm256_shuffle_epi8(cd, order);
                    low_ab = _mm256_add_epi32(low_ab, _mm256_madd_epi16(ab_pair, low_pair));
                    high_ab = _mm256_add_epi32(high_ab, _mm256_madd_epi16(ab_pair, high_pair));
                    low_cd = _mm256_add_epi32(low_cd, _mm256_madd_epi16(cd_pair, low_pair));
                    high_cd = _mm256_add_epi32(high_cd, _mm256_madd_epi16(cd_pair, high_pair));
                }
            }
            const __m256i ab_sum = _mm256_srai_epi32(total(low_ab, high_ab), BITS);
            const __m256i cd_sum = _mm256_srai_epi32(total(low_cd, high_cd), BITS);
            /* Low half: a pixel of a and one of c. High half: of b and d. */
            const __m256i words = _mm256_packs_epi32(ab_sum, cd_sum), bytes = _mm256_packus_epi16(words, words);
            const __m128i ac = _mm256_castsi256_si128(bytes), bd = _mm256_extracti128_si256(bytes, 1);
            uint8_t *to = out + 4 * (size_t)i;
            store_pixel(to + row[0] * out_stride, ac);
            store_pixel(to + row[1] * out_stride, bd);
            store_pixel(to + row[2] * out_stride, _mm_srli_epi64(ac, 32));
            store_pixel(to + row[3] * out_stride, _mm_srli_epi64(bd, 32));
        }
    }
}

/* Like across_portable, for pixels of 1 byte: four rows and sixteen taps at a time. */
WITH_AVX2 static void across1_avx2(const struct axis *axis, struct plane in, int32_t rows, uint8_t *out) {
    for (int32_t y = 0; y < rows; y += 4) {
        size_t row[4];
        for (int32_t r = 0; r < 4; r++) {
            row[r] = y + r < rows ? y + r : rows - 1;
        }
        for (int32_t i = 0; i < axis->count; i++) {
            const int16_t *low = axis->low + (size_t)i * axis->stride, *high = axis->high + (size_t)i * axis->stride;
            __m256i sum[4];
            for (int32_t r = 0; r < 4; r++) {
                const uint8_t *pixel = in.pixels + row[r] * in.stride + axis->first[i];
                __m256i low_sum = _mm256_setzero_si256(), high_sum = low_sum;
                for (int32_t t = 0; t < axis->taps[i]; t += 16) {
                    const __m256i words = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)(pixel + t)));
                    const __m256i low_16 = _mm256_loadu_si256((const __m256i *)(low + t));
                    const __m256i high_16 = _mm256_loadu_si256((const __m256i *)(high + t));
                    low_sum = _mm256_add_epi32(low_sum, _mm256_madd_epi16(words, low_16));
                    high_sum = _mm256_add_epi32(high_sum, _mm256_madd_epi16(words, high_16));
                }
                sum[r] = _mm256_add_epi32(low_sum, _mm256_slli_epi32(high_sum, LOW_BITS));
            }
            const __m256i pairs = _mm256_hadd_epi32(_mm256_hadd_epi32(sum[0], sum[1]), _mm256_hadd_epi32(sum[2], sum[3]));
            __m128i four = _mm_add_epi32(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256(pairs, 1));
            four = _mm_srai_epi32(_mm_add_epi32(four, _mm_set1_epi32(HALF)), BITS);
            four = _mm_packs_epi32(four, four);
            uint8_t bytes[4];
            store_pixel(bytes, _mm_packus_epi16(four, four));
            for (int32_t r = 0; r < 4; r++) {
                out[row[r] * axis->count + i] = bytes[r];
            }
        }
    }
}

/* Like down_portable: sixteen bytes of two rows at a time. */
WITH_AVX2 static void down_avx2(const struct axis *axis, struct plane in, int32_t origin, size_t row_bytes, uint8_t *out) {
    for (int32_t i = 0; i < axis->count; i++, out += row_bytes) {
        const uint8_t *rows = in.pixels + (size_t)(axis->first[i] - origin) * in.stride;
        const int16_t *low = axis->low + (size_t)i * axis->stride, *high = axis->high + (size_t)i * axis->stride;
        const int32_t taps = axis->taps[i];
        size_t x = 0;
        for (; x + 16 <= row_bytes; x += 16) {
            __m256i low_a = _mm256_setzero_si256(), high_a = low_a, low_b = low_a, high_b = low_a;
            for (int32_t t = 0; t < taps; t += 2) {
                const uint8_t *one = rows + t * in.stride + x, *next = t + 1 < taps ? one + in.stride : one;
                const __m128i first = _mm_loadu_si128((const __m128i *)one);
                const __m128i second = _mm_loadu_si128((const __m128i *)next);
                const __m256i a = _mm256_cvtepu8_epi16(_mm_unpacklo_epi8(first, second));
                const __m256i b = _mm256_cvtepu8_epi16(_mm_unpackhi_epi8(first, second));
                const __m256i low_pair = pair_of(low + t), high_pair = pair_of(high + t);
                low_a = _mm256_add_epi32(low_a, _mm256_madd_epi16(a, low_pair));
                high_a = _mm256_add_epi32(high_a, _mm256_madd_epi16(a, high_pair));
                low_b = _mm256_add_epi32(low_b, _mm256_madd_epi16(b, low_pair));
                high_b = _mm256_add_epi32(high_b, _mm256_madd_epi16(b, high_pair));
            }
            const __m256i a = _mm256_srai_epi32(total(low_a, high_a), BITS);
            const __m256i b = _mm256_srai_epi32(total(low_b, high_b), BITS);
            const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(a, b), 0xD8);
            const __m128i bytes = _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
            _mm_storeu_si128((__m128i *)(out + x), bytes);
        }
        for (; x < row_bytes; x++) {
            int32_t sum = HALF;
            for (int32_t t = 0; t < taps; t++) {
                sum += axis->whole[(size_t)i * axis->stride + t] * rows[t * in.stride + x];
            }
            out[x] = rounded(sum);
        }
    }
}

/* With Zig's runtime __builtin_cpu_supports always says no. */
static int has_avx2(void) {
    const uint32_t osxsave_and_avx = 3u << 27, avx2 = 1u << 5, xmm_and_ymm = 6;
    uint32_t a, b, c, d, states;
    if (!__get_cpuid(1, &a, &b, &c, &d) || (c & osxsave_and_avx) != osxsave_and_avx) {
        return 0;
    }
    __asm__("xgetbv" : "=a"(states), "=d"(d) : "c"(0)); /* the registers that the operating system saves */
    return (states & xmm_and_ymm) == xmm_and_ymm && __get_cpuid_count(7, 0, &a, &b, &c, &d) && (b & avx2);
}
#else
static int has_avx2(void) { return 0; }
#endif

/* ---- Both passes. ---- */

static int across(struct axis *axis, struct plane in, int32_t length, int32_t rows, int32_t bands, int32_t form,
                  uint8_t *out) {
#if HAS_AVX2_FORM
    const int32_t group = bands == 4 ? 4 : 16;
    if (form == AVX2 && fits_avx2(axis, length, group)) {
        const int state = split_axis(axis, length, group);
        if (state == DONE) {
            (bands == 4 ? across4_avx2 : across1_avx2)(axis, in, rows, out);
        }
        return state;
    }
#endif
    (void)length;
    (void)form;
    across_portable(axis, in, rows, bands, out);
    return DONE;
}

static int down(struct axis *axis, struct plane in, int32_t origin, size_t row_bytes, int32_t form, uint8_t *out) {
#if HAS_AVX2_FORM
    if (form == AVX2) {
        const int state = split_axis(axis, 0, 2);
        if (state == DONE) {
            down_avx2(axis, in, origin, row_bytes, out);
        }
        return state;
    }
#endif
    (void)form;
    down_portable(axis, in, origin, row_bytes, out);
    return DONE;
}

enum { BETWEEN, KEPT, SCRATCHES };

/* This thread's scratch memory, kept until the process ends: 10 MB at most for images of 100 megapixels. If malloc returned
   it to the system each time, the page faults would cost as much as resizing a photograph of 640 x 480. */
static uint8_t *scratch(int which, size_t bytes) {
    static _Thread_local struct { uint8_t *memory; size_t bytes; } mine[SCRATCHES];
    if (bytes > mine[which].bytes) {
        free(mine[which].memory);
        mine[which].memory = malloc(bytes);
        mine[which].bytes = mine[which].memory ? bytes : 0;
    }
    return mine[which].memory;
}

struct job {
    int32_t width, height, bands, resized_width, resized_height, left, top, side, turn, form;
    float box_width, box_height;
};

static int resample(const struct job *job, const uint8_t *pixels, uint8_t *out) {
    const int32_t side = job->side, bands = job->bands;
    const size_t stride = (size_t)job->width * bands, kept_bytes = (size_t)side * bands;
    const int is_across = job->resized_width != job->width || job->box_width != (float)job->resized_width;
    const int is_down = job->resized_height != job->height || job->box_height != (float)job->resized_height;
    /* Pillow's rule since 13: the vertical pass is first if the height shrinks by more than twice as much as the width. */
    const int64_t less_height = (int64_t)job->height - job->resized_height;
    const int64_t less_width = (int64_t)job->width - job->resized_width;
    const int is_sideways = (job->turn & SIDEWAYS) != 0;
    const int down_first = is_sideways ? !(less_width > 0 && less_width > 2 * less_height)
                                       : less_height > 0 && less_height > 2 * less_width;

    if (!is_across && !is_down) {
        return BAD_ARGUMENTS; /* nothing to resize */
    }

    /* An axis that is not resized needs only the kept pixels. */
    const int is_mirrored_across = job->turn & MIRRORED_COLUMNS, is_mirrored_down = job->turn & MIRRORED_ROWS;
    const int32_t left = is_mirrored_across ? job->width - side - job->left : job->left;
    const int32_t top = is_mirrored_down ? job->height - side - job->top : job->top;
    struct axis columns = {.begin = left, .end = left + side}, rows = {.begin = top, .end = top + side};
    int state = DONE;
    if (is_across) {
        state = make_axis(&columns, job->width, job->box_width, job->resized_width, job->left, side,
                          is_mirrored_across);
    }
    if (is_down && state == DONE) {
        state = make_axis(&rows, job->height, job->box_height, job->resized_height, job->top, side, is_mirrored_down);
    }
    struct plane in = {pixels + rows.begin * stride, stride};
    if (state == DONE && is_across && is_down) {
        const int32_t seen_rows = rows.end - rows.begin;
        const size_t seen_bytes = (size_t)(columns.end - columns.begin) * bands;
        uint8_t *between = scratch(BETWEEN, down_first ? side * seen_bytes : seen_rows * kept_bytes);
        if (!between) {
            state = NO_MEMORY;
        } else if (down_first) {
            in.pixels += (size_t)columns.begin * bands;
            state = down(&rows, in, rows.begin, seen_bytes, job->form, between);
            for (int32_t i = 0; i < side; i++) {
                columns.first[i] -= columns.begin;
            }
            if (state == DONE) {
                const struct plane seen = {between, seen_bytes};
                state = across(&columns, seen, columns.end - columns.begin, side, bands, job->form, out);
            }
        } else {
            state = across(&columns, in, job->width, seen_rows, bands, job->form, between);
            if (state == DONE) {
                const struct plane seen = {between, kept_bytes};
                state = down(&rows, seen, rows.begin, kept_bytes, job->form, out);
            }
        }
    } else if (state == DONE && is_across) {
        state = across(&columns, in, job->width, side, bands, job->form, out);
    } else if (state == DONE && is_down) {
        in.pixels += (size_t)columns.begin * bands;
        state = down(&rows, in, rows.begin, kept_bytes, job->form, out);
    }
    free_axis(&columns);
    free_axis(&rows);
    return state;
}

/* The windows that clip_resample uses along an axis, for clip_gpu.cu: `first` and `taps` have `count` numbers, `whole` has
   `stride` for each. Returns what clip_resample returns; 1 also if `stride` is not round_up(ceil(support) * 2 + 1, 16). */
int clip_resample_axis(int32_t length, int32_t resized, int32_t kept, int32_t count, int32_t is_mirrored, int32_t stride,
                       int32_t *first, int32_t *taps, int32_t *whole) {
    if (length < 1 || length > MAX_LENGTH || count < 1 || count > MAX_SIDE || kept < 0 || kept > resized - count || !first ||
        !taps || !whole) {
        return BAD_ARGUMENTS;
    }
    struct axis axis;
    int state = make_axis(&axis, length, (float)length, resized, kept, count, is_mirrored);
    if (state == DONE && axis.stride != stride) {
        state = BAD_ARGUMENTS;
    }
    if (state == DONE) {
        memcpy(first, axis.first, count * sizeof *first);
        memcpy(taps, axis.taps, count * sizeof *taps);
        memcpy(whole, axis.whole, (size_t)count * stride * sizeof *whole);
    }
    free_axis(&axis);
    return state;
}

/* The best form for this processor. */
int clip_resample_best_form(void) {
    static int best = -1; /* cpuid is slow in a virtual machine */
    if (best < 0) {
        best = has_avx2() ? AVX2 : PORTABLE;
    }
    return best;
}

/* Writes the `side` x `side` pixels at (left, top) of Pillow's resize(size, BICUBIC, (0, 0, *box)) to `out`.

   `image` is exported by Pillow, with 1 byte a pixel, or with 4 of which `bands_out` (3 or 4) are kept. `out` has side *
   side * bands_out bytes. If `turn` is not 0, the image is resized as if it had been turned before. (left, top) and the
   box then count from the turned image's corner, but sides and `out` keep the order of the image before the turn.
   Returns 0; 1 for inconsistent arguments; 2 if memory runs out. */
int clip_resample(const struct ArrowArray *image, int32_t width, int32_t height, int32_t bands, float box_width,
                  float box_height, int32_t resized_width, int32_t resized_height, int32_t left, int32_t top,
                  int32_t side, int32_t turn, int32_t bands_out, uint8_t *out, int64_t out_bytes, int32_t form) {
    if (!image || !out || width < 1 || height < 1 || width > MAX_LENGTH || height > MAX_LENGTH || side < 1 || side > MAX_SIDE ||
        left < 0 || top < 0 || turn < 0 || turn >= TURNS ||
        resized_width < 1 || resized_height < 1 || left > resized_width - side || top > resized_height - side ||
        !(box_width >= 0.5f && box_width <= (float)width && box_height >= 0.5f && box_height <= (float)height) ||
        !((bands == 1 && bands_out == 1) || (bands == 4 && (bands_out == 3 || bands_out == 4))) ||
        out_bytes != (int64_t)side * side * bands_out || form < PORTABLE || form > clip_resample_best_form()) {
        return BAD_ARGUMENTS;
    }
    const struct ArrowArray *values = bands == 4 && image->n_children == 1 ? image->children[0] : image;
    if (values->n_children != 0 || values->n_buffers != 2 || values->offset != 0 || !values->buffers[1] ||
        values->length != (int64_t)width * height * bands) {
        return BAD_ARGUMENTS;
    }
    const struct job job = {width, height, bands, resized_width, resized_height, left, top, side, turn, form,
                            box_width, box_height};
    if (bands_out != 3) {
        return resample(&job, values->buffers[1], out);
    }
    uint8_t *kept = scratch(KEPT, (size_t)side * side * 4);
    if (!kept) {
        return NO_MEMORY;
    }
    const int state = resample(&job, values->buffers[1], kept);
    const size_t last = (size_t)side * side - 1;
    for (size_t pixel = 0; state == DONE && pixel < last; pixel++) {
        memcpy(out + 3 * pixel, kept + 4 * pixel, 4); /* the fourth byte is overwritten by the next pixel */
    }
    if (state == DONE) {
        memcpy(out + 3 * last, kept + 4 * last, 3);
    }
    return state;
}
