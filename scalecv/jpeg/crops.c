/* JPEG files to squares of one size: of each file only a box becomes pixels (libjpeg-turbo), and the box is resized into
   the batch. The pixels are those of decoding the whole file and resizing the box by torch's kernel for bytes
   (bilinear, antialias), bit for bit: libjpeg-turbo's colours are interpolated from one pixel further on each side, and
   weights and roundings are those of the kernel.

   cc -O3 -ffp-contract=off -shared -fPIC crops.c sums.c -o native.so -ljpeg -lm

   What it is compiled on does not matter: a processor with AVX2 is quick, any other one right. */
#include <math.h>
#include <setjmp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <jpeglib.h>
#if defined(__x86_64__) && !defined(PLAIN)
#include <immintrin.h>
#define QUICK __attribute__((target("avx2")))
#define INLINE static inline __attribute__((always_inline, target("avx2")))
#endif

#ifndef SOURCE
#define SOURCE ""
#endif
const char source[] = SOURCE; /* which crops.c and sums.c these were, for those who load them */

enum { PAD = 64, AT_ONCE = 4, UNALIGNED = 8 }; /* PAD: bytes behind each buffer that a vector may read */

struct failure { struct jpeg_error_mgr manager; jmp_buf jump; };

/* Which pixels make a pixel of the output, on one axis. */
struct axis {
    int taps;             /* an even number: a zero weight where there are fewer */
    int bits;             /* weights are in units of 2^-bits */
    int32_t *first;       /* [out] */
    int16_t *weight;      /* [out][taps] */
};

static void on_error(j_common_ptr jpeg) { longjmp(((struct failure *)jpeg->err)->jump, 1); }
static void on_message(j_common_ptr jpeg) { (void)jpeg; }

static size_t aligned(size_t bytes) { return (bytes + 63) & ~(size_t)63; }

static int most_taps(int in, int out) {
    double scale = (double)in / out, support = scale > 1 ? scale : 1;
    return ((int)ceil(support) * 2 + 1 + 3) / 4 * 4;
}

static size_t axis_bytes(int in, int out) {
    size_t taps = most_taps(in, out);
    return aligned(out * sizeof(int32_t)) + aligned(out * taps * sizeof(int16_t)) + aligned(out * taps * sizeof(double));
}

/* A triangle filter from `in` to `out` pixels. */
static uint8_t *triangle(struct axis *axis, int in, int out, int is_mirrored, uint8_t *memory) {
    const int most = most_taps(in, out);
    const double scale = (double)in / out, support = scale >= 1 ? scale : 1, inverse = scale >= 1 ? 1 / scale : 1;
    axis->first = (int32_t *)memory;
    memory += aligned(out * sizeof(int32_t));
    axis->weight = (int16_t *)memory;
    memory += aligned(out * most * sizeof(int16_t));
    double *exact = (double *)memory, largest = 0;
    axis->taps = 1;
    for (int o = 0; o < out; o++) {
        const int at = is_mirrored ? out - 1 - o : o;
        const double centre = scale * (o + 0.5);
        int from = (int)(centre - support + 0.5), to = (int)(centre + support + 0.5);
        if (from < 0) from = 0;
        if (to > in) to = in;
        double *weight = exact + (size_t)at * most, sum = 0;
        for (int i = 0; i < most; i++) weight[i] = 0;
        for (int i = 0; i < to - from; i++) {
            double w = fabs((i + from - centre + 0.5) * inverse);
            weight[i] = w < 1 ? 1 - w : 0;
            sum += weight[i];
        }
        int taps = 0;
        for (int i = 0; i < to - from; i++) {
            weight[i] /= sum;
            if (weight[i] > largest) largest = weight[i];
            if (weight[i] > 0) taps = i + 1;
        }
        if (taps > axis->taps) axis->taps = taps;
        axis->first[at] = from;
    }
    for (axis->bits = 0; axis->bits < 22; axis->bits++)
        if ((int)(0.5 + largest * (1 << (axis->bits + 1))) >= 1 << 15) break;
    axis->taps = axis->taps <= 2 ? 2 : (axis->taps + 3) / 4 * 4;
    for (int o = 0; o < out; o++)
        for (int i = 0; i < axis->taps; i++) {
            double w = exact[(size_t)o * most + i] * (1 << axis->bits);
            axis->weight[(size_t)o * axis->taps + i] = (int16_t)(0.5 + w);
        }
    return (uint8_t *)exact;
}

static uint8_t clipped(int sum, int bits) {
    sum >>= bits;
    return sum < 0 ? 0 : sum > 255 ? 255 : sum;
}

#ifdef QUICK
static int is_quick(void) { return __builtin_cpu_supports("avx2"); }

/* Sums of two output pixels, four of 32 bits each. */
INLINE __m256i two(const uint8_t *line, const struct axis *x, int o, int taps, __m256i half) {
    const __m256i front = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, -1, 4, -1, 1, -1, 5, -1, 2, -1, 6, -1, 3, -1, 7, -1));
    const __m256i back = _mm256_broadcastsi128_si256(_mm_setr_epi8(8, -1, 12, -1, 9, -1, 13, -1, 10, -1, 14, -1, 11, -1, 15, -1));
    const uint8_t *left = line + 4 * x->first[o], *right = line + 4 * x->first[o + 1];
    const int16_t *w = x->weight + (size_t)o * taps, *v = w + taps;
    __m256i sum = half;
    if (taps == 2) {
        __m256i pixels = _mm256_set_m128i(_mm_loadl_epi64((const __m128i *)right), _mm_loadl_epi64((const __m128i *)left));
        int32_t a, b;
        memcpy(&a, w, 4);
        memcpy(&b, v, 4);
        __m256i weights = _mm256_set_m128i(_mm_set1_epi32(b), _mm_set1_epi32(a));
        return _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_shuffle_epi8(pixels, front), weights));
    }
    for (int t = 0; t < taps; t += 4) {
        __m256i pixels = _mm256_set_m128i(_mm_loadu_si128((const __m128i *)(right + 4 * t)), _mm_loadu_si128((const __m128i *)(left + 4 * t)));
        __m256i weights = _mm256_set_m128i(_mm_loadl_epi64((const __m128i *)(v + t)), _mm_loadl_epi64((const __m128i *)(w + t)));
        sum = _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_shuffle_epi8(pixels, front), _mm256_shuffle_epi32(weights, 0x00)));
        sum = _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_shuffle_epi8(pixels, back), _mm256_shuffle_epi32(weights, 0x55)));
    }
    return sum;
}

INLINE void across_by(const uint8_t *line, const struct axis *x, int side, int taps, uint8_t *out) {
    const __m256i half = _mm256_set1_epi32(1 << (x->bits - 1));
    const __m128i bits = _mm_cvtsi32_si128(x->bits);
    const __m256i order = _mm256_setr_epi8(0, 1, 2, -1, -1, -1, 4, 5, 6, -1, -1, -1, -1, -1, -1, -1, /* pixels 0 and 2 */
                                           -1, -1, -1, 0, 1, 2, -1, -1, -1, 4, 5, 6, -1, -1, -1, -1); /* 1 and 3 */
    int o = 0;
    for (; o + 4 <= side; o += 4) {
        __m256i a = _mm256_sra_epi32(two(line, x, o, taps, half), bits), b = _mm256_sra_epi32(two(line, x, o + 2, taps, half), bits);
        __m256i words = _mm256_packs_epi32(a, b);
        __m256i bytes = _mm256_shuffle_epi8(_mm256_packus_epi16(words, words), order);
        __m128i four = _mm_or_si128(_mm256_castsi256_si128(bytes), _mm256_extracti128_si256(bytes, 1));
        _mm_storeu_si128((__m128i *)(out + 3 * o), four);
    }
}

QUICK static void across_quick(const uint8_t *line, const struct axis *x, int side, uint8_t *out) {
    if (x->taps == 2) across_by(line, x, side, 2, out);
    else if (x->taps == 4) across_by(line, x, side, 4, out);
    else across_by(line, x, side, x->taps, out);
}

INLINE void down_by(const uint8_t *rows, size_t stride, int values, const int16_t *weight, int taps, int bits, uint8_t *out) {
    const __m256i half = _mm256_set1_epi32(1 << (bits - 1));
    const __m128i shift = _mm_cvtsi32_si128(bits);
    for (int i = 0; i + 16 <= values; i += 16) {
        __m256i low = half, high = half;
        for (int t = 0; t < taps; t += 2) {
            __m128i one = _mm_loadu_si128((const __m128i *)(rows + t * stride + i));
            __m128i next = _mm_loadu_si128((const __m128i *)(rows + (t + 1) * stride + i));
            int32_t pair;
            memcpy(&pair, weight + t, 4);
            __m256i weights = _mm256_set1_epi32(pair);
            low = _mm256_add_epi32(low, _mm256_madd_epi16(_mm256_cvtepu8_epi16(_mm_unpacklo_epi8(one, next)), weights));
            high = _mm256_add_epi32(high, _mm256_madd_epi16(_mm256_cvtepu8_epi16(_mm_unpackhi_epi8(one, next)), weights));
        }
        __m256i words = _mm256_packs_epi32(_mm256_sra_epi32(low, shift), _mm256_sra_epi32(high, shift));
        words = _mm256_permute4x64_epi64(words, 0xd8);
        _mm_storeu_si128((__m128i *)(out + i), _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1)));
    }
}

QUICK static void down_quick(const uint8_t *rows, size_t stride, int values, const int16_t *weight, int taps, int bits, uint8_t *out) {
    if (taps == 2) down_by(rows, stride, values, weight, 2, bits, out);
    else if (taps == 4) down_by(rows, stride, values, weight, 4, bits, out);
    else down_by(rows, stride, values, weight, taps, bits, out);
}
#endif

/* One line of pixels, 4 bytes each, to `side` pixels of 3 bytes. */
static void across(const uint8_t *line, const struct axis *x, int side, uint8_t *out) {
    int from = 0;
#ifdef QUICK
    if (is_quick()) {
        across_quick(line, x, side, out);
        from = side / 4 * 4;
    }
#endif
    for (int o = from; o < side; o++)
        for (int c = 0; c < 3; c++) {
            int sum = 1 << (x->bits - 1);
            for (int t = 0; t < x->taps; t++) sum += x->weight[(size_t)o * x->taps + t] * line[4 * (x->first[o] + t) + c];
            out[3 * o + c] = clipped(sum, x->bits);
        }
}

/* `taps` rows of `values` bytes to one. */
static void down(const uint8_t *rows, size_t stride, int values, const int16_t *weight, int taps, int bits, uint8_t *out) {
    int from = 0;
#ifdef QUICK
    if (is_quick()) {
        down_quick(rows, stride, values, weight, taps, bits, out);
        from = values / 16 * 16;
    }
#endif
    for (int i = from; i < values; i++) {
        int sum = 1 << (bits - 1);
        for (int t = 0; t < taps; t++) sum += weight[t] * rows[t * stride + i];
        out[i] = clipped(sum, bits);
    }
}

/* Bytes of memory for one image: its width, the box's height and width, the side of the output. */
size_t room(int width, int box_height, int box_width, int side) {
    size_t row = aligned(((size_t)width + 32) * 4 + PAD + 16 * (size_t)most_taps(box_width, side));
    size_t decoded = aligned(UNALIGNED + AT_ONCE * row);
    size_t lines = aligned(((size_t)box_height + most_taps(box_height, side)) * side * 3 + PAD);
    return decoded + lines + axis_bytes(box_width, side) + axis_bytes(box_height, side);
}

/* box: top, left, height, width, flips (1: left-right, 2: up-down). */
static int one(struct jpeg_decompress_struct *jpeg, const uint8_t *data, size_t size, const int32_t *box, int side,
               uint8_t *memory, size_t memory_bytes, uint8_t *out) {
    const int top = box[0], left = box[1], height = box[2], width = box[3];
    jpeg_mem_src(jpeg, (unsigned char *)data, size);
    jpeg_read_header(jpeg, TRUE);
    if (jpeg->num_components != 3) return 1;
    jpeg->out_color_space = JCS_EXT_RGBX;
    jpeg_start_decompress(jpeg);
    if (top + height > (int)jpeg->output_height || left + width > (int)jpeg->output_width) return 1;
    if (room(jpeg->output_width, height, width, side) > memory_bytes) return 2;
    /* A column more to each side, and a row above: colours of the box's edge are interpolated from their neighbours. */
    JDIMENSION first = left > 0 ? left - 1 : 0, columns = left + width + 1;
    if (columns > jpeg->output_width) columns = jpeg->output_width;
    columns -= first;
    if (columns < jpeg->output_width) jpeg_crop_scanline(jpeg, &first, &columns);
    else first = 0;
    /* Not aligned: libjpeg-turbo would write around the caches, and rows are read at once. */
    const size_t stride = aligned((size_t)columns * 4 + PAD + 16 * (size_t)most_taps(width, side));
    uint8_t *const some = memory + UNALIGNED, *const lines = memory + aligned(UNALIGNED + AT_ONCE * stride);
    struct axis x, y;
    memory = lines + aligned(((size_t)height + most_taps(height, side)) * side * 3 + PAD);
    memory = triangle(&x, width, side, box[4] & 1, memory);
    triangle(&y, height, side, box[4] & 2, memory);
    if (top > 0) jpeg_skip_scanlines(jpeg, top);
    for (int row = 0; row < height;) {
        JSAMPROW rows[AT_ONCE];
        for (int i = 0; i < AT_ONCE; i++) rows[i] = some + stride * i;
        const int more = height - row, count = jpeg_read_scanlines(jpeg, rows, more < AT_ONCE ? more : AT_ONCE);
        for (int i = 0; i < count; i++, row++)
            across(rows[i] + (left - first) * 4, &x, side, lines + (size_t)row * side * 3);
    }
    for (int o = 0; o < side; o++)
        down(lines + (size_t)y.first[o] * side * 3, side * 3, side * 3, y.weight + (size_t)o * y.taps, y.taps, y.bits,
             out + (size_t)o * side * 3);
    return 0;
}

/* data, size: encoded images; boxes: 5 numbers each; out: side x side x 3 bytes each; memory: for one thread.
   Fills `status`: 0 done, 1 left alone (not a picture of three colours, or libjpeg-turbo has something to say). */
void crop_images(int count, const uint8_t *const *data, const size_t *size, const int32_t *boxes, int side,
                 uint8_t *const *out, uint8_t *memory, size_t memory_bytes, uint8_t *status) {
    struct jpeg_decompress_struct jpeg;
    struct failure failure;
    jpeg.err = jpeg_std_error(&failure.manager);
    failure.manager.error_exit = on_error;
    failure.manager.output_message = on_message;
    memset(status, 1, count);
    volatile int i = 0;
    if (setjmp(failure.jump)) {
        if (i == -1) return;
        jpeg_abort_decompress(&jpeg);
        i++;
    } else {
        i = -1;
        jpeg_create_decompress(&jpeg);
        i = 0;
    }
    for (; i < count; i++) {
        failure.manager.num_warnings = 0;
        status[i] = one(&jpeg, data[i], size[i], boxes + 5 * i, side, memory, memory_bytes, out[i]);
        if (failure.manager.num_warnings) status[i] = 1;
        jpeg_abort_decompress(&jpeg);
    }
    jpeg_destroy_decompress(&jpeg);
}
