#include "model.h"
#include <ctype.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { DIMENSIONS = 192, MAX_WORDS = 32768, PLACES_BETWEEN_CHECKS = 512 };

static char *text;
static const char *words[MAX_WORDS];
static uint64_t hashes[MAX_WORDS];
static int word_count;
static float keys[MAX_WORDS][DIMENSIONS]; /* what stands before each word */
static float weights[MAX_WORDS];

static uint64_t next_random(uint64_t *state) { /* splitmix64 */
  uint64_t z = *state += 0x9e3779b97f4a7c15;
  z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
  z = (z ^ z >> 27) * 0x94d049bb133111eb;
  return z ^ z >> 31;
}

/* Words that differ in case and punctuation only have the same hash. */
static uint64_t hash_word(const char *word, size_t length) {
  uint64_t hash = 0xcbf29ce484222325;
  for (size_t i = 0; i < length; i++) {
    if (isalnum((unsigned char)word[i])) hash = (hash ^ (uint64_t)tolower((unsigned char)word[i])) * 0x100000001b3;
  }
  return hash;
}

/* Adds the vector of a word: random signs, so that the vectors of different words are nearly orthogonal. */
static void add_word(float *sum, uint64_t hash, float weight) {
  uint64_t bits = 0;
  for (int d = 0; d < DIMENSIONS; d++) {
    if (d % 64 == 0) bits = next_random(&hash);
    sum[d] += bits >> d % 64 & 1 ? weight : -weight;
  }
}

static const float weight_of[CONTEXT_WORDS] = {1, 0.8F, 0.5F, 0.3F};

void model_load(const char *path) {
  FILE *file = fopen(path, "r");
  if (!file) perror(path), exit(1);
  fseek(file, 0, SEEK_END);
  size_t size = (size_t)ftell(file);
  rewind(file);
  text = malloc(size + 1);
  if (!text || fread(text, 1, size, file) != size) fprintf(stderr, "%s cannot be read\n", path), exit(1);
  text[size] = 0;
  fclose(file);
  for (char *word = strtok(text, " \n"); word && word_count < MAX_WORDS; word = strtok(NULL, " \n")) {
    words[word_count] = word;
    hashes[word_count++] = hash_word(word, strlen(word));
  }
  for (int place = 0; place < word_count; place++) {
    for (int i = 0; i < CONTEXT_WORDS && i < place; i++) add_word(keys[place], hashes[place - 1 - i], weight_of[i]);
  }
}

void model_begin(struct context *context, const char *seed, const char *prompt) {
  context->random = hash_word(seed, strlen(seed));
  for (int i = 0; i < CONTEXT_WORDS; i++) context->words[i] = -1;
  for (const char *at = prompt; *at;) {
    size_t length = strcspn(at, " ");
    uint64_t hash = hash_word(at, length);
    context->random ^= hash;
    next_random(&context->random);
    for (int place = 0; place < word_count; place++) { /* words that the book does not have are left out */
      if (hashes[place] != hash) continue;
      memmove(context->words + 1, context->words, sizeof context->words - sizeof *context->words);
      context->words[0] = place;
      break;
    }
    at += length;
    at += strspn(at, " ");
  }
}

const char *model_next(struct context *context, const uint32_t *status_word) {
  float query[DIMENSIONS] = {0};
  for (int i = 0; i < CONTEXT_WORDS; i++) {
    if (context->words[i] >= 0) add_word(query, hashes[context->words[i]], weight_of[i]);
  }
  double sum = 0;
  for (int place = 1; place < word_count; place++) {
    if (place % PLACES_BETWEEN_CHECKS == 0 && __atomic_load_n(status_word, __ATOMIC_RELAXED)) return NULL;
    float likeness = 0;
    for (int d = 0; d < DIMENSIONS; d++) likeness += query[d] * keys[place][d];
    weights[place] = expf(likeness * (14.0F / DIMENSIONS));
    sum += weights[place];
  }
  double left = sum * (double)(next_random(&context->random) >> 11) / (double)(UINT64_C(1) << 53);
  int chosen = 1;
  while (chosen < word_count - 1 && (left -= weights[chosen]) > 0) chosen++;
  memmove(context->words + 1, context->words, sizeof context->words - sizeof *context->words);
  context->words[0] = chosen;
  return words[chosen];
}
