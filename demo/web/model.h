/* A Markov model over a book: what follows the last four words, wherever the book has something like them? */
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum { CONTEXT_WORDS = 4 };

struct context {
  int words[CONTEXT_WORDS]; /* places in the book, the last word first; -1: none */
  uint64_t random;
};

/* Reads the book. Prints an error and exits if it cannot. */
void model_load(const char *path);

/* Begins an answer to a prompt. Each seed has another answer. */
void model_begin(struct context *context, const char *seed, const char *prompt);

/*
 * Computes the next word, which is some milliseconds of work. Returns NULL if the word at `status_word` becomes other
 * than 0 in the meantime: the client has left, and the rest of the work would be for nobody.
 */
const char *model_next(struct context *context, const uint32_t *status_word);
