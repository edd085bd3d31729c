/*
 * gateway URL NAME OPTIONS: clients come, stream and leave, with one thread for all of them.
 */
#include "soak.h"

enum kind { READS, LEAVES, CANCELS, SLOW, MARKED, FAILS, RACES, KINDS };
static const char *const kind_names[] = {"reads", "leaves", "cancels", "slow", "marked", "fails", "races"};
static const int shares[KINDS] = {50, 15, 10, 5, 5, 5, 10}; /* of a hundred clients */
static const char *const workers[] = {"c", "c", "c", "go", "go", "go", "python", "victim"};
static const char *const status_names[] = {
    "OK",        "INVALID",       "OFFLINE", "CLOSED",  "CANCELLED", "FULL",   "TOO_LARGE", "RESERVED", "DISCONNECTED",
    "PEER_GONE", "NO_RESPONDERS", "BUSY",    "TIMEOUT", "REMOTE",    "FORKED", "INTERNAL",
};

enum { SLOTS = 1 << 14, KEYS = 400, TICK_MS = 10, SILENCE_MS = 10000 };

typedef struct client {
  char id[64];
  enum kind kind;
  bool has_come, is_here;
  presence_session *session;
  int64_t comes_at, begins_at[2], leaves_at;
  int begun, streams, running; /* the number of its streams */
} client;

typedef struct stream {
  presence_stream *handle; /* NULL: the slot is free */
  client *client;          /* NULL: anonymous */
  enum kind kind;
  const char *worker;
  uint64_t tag, key;
  long count, received;
  size_t size, unread;
  int64_t last, cancelled_at; /* when its last message came; when it is to be cancelled, 0: never */
  bool on_lane, is_silent, is_wrong;
} stream;

static presence_conn *conns[2];
static presence_queue *queue;
static presence_config *plain, *narrow; /* options of a request, and of a slow reader's */
static const char *name;
static uint64_t random_state;
static client *clients;
static long client_count, not_gone;
static stream streams[SLOTS];
static long running, most_here, here;
static struct { char key[80]; long count; } counts[KEYS];

static uint64_t random_below(uint64_t limit) { return scramble(random_state++) % limit; }

static void count(const stream *s, const char *outcome) {
  char key[80];
  snprintf(key, sizeof key, "%s %s %s %s %s", s->on_lane ? "lane" : "level0", s->worker,
           s->client ? kind_names[s->kind] : "settle", s->received ? "some" : "none", outcome);
  int i = 0;
  while (counts[i].count && strcmp(counts[i].key, key) != 0) i++;
  strcpy(counts[i].key, key);
  counts[i].count++;
}

static void is_over(stream *s, const char *outcome) {
  count(s, outcome);
  presence_stream_free(s->handle);
  s->handle = NULL;
  running--;
  if (s->client) s->client->running--;
}

static stream *free_slot(void) {
  static int at;
  while (streams[at].handle) at = (at + 1) % SLOTS;
  return &streams[at];
}

/* Requests a stream from a worker: from a connection with or without lanes, at a subject of the worker with or
 * without lanes. */
static void begin(client *c, enum kind kind, const char *worker, bool lanes_here, bool lanes_there, int64_t now) {
  stream *s = free_slot();
  long burst, pause;
  *s = (stream){.client = c, .kind = kind, .worker = worker, .last = now, .tag = (s->tag / SLOTS + 1) * SLOTS + (uint64_t)(s - streams)};
  s->on_lane = lanes_here && lanes_there;
  s->key = random_below(1ULL << 62);
  uint64_t shape = random_below(100);
  if (kind == SLOW) { /* more than its window */
    s->count = 50, s->size = 2000, burst = 50, pause = 0;
  } else if (shape < 70) {
    s->count = 1 + (long)random_below(50), s->size = HEAD + random_below(200);
    burst = 1 + (long)random_below(10), pause = (long)random_below(100);
  } else if (shape < 95) {
    s->count = 200 + (long)random_below(1800), s->size = HEAD + random_below(100);
    burst = 100 + (long)random_below(900), pause = (long)random_below(50);
  } else {
    s->count = 5 + (long)random_below(20), s->size = HEAD + random_below(20000), burst = 5, pause = 50;
  }
  if (kind == CANCELS) s->cancelled_at = now + 1 + (int64_t)random_below(300);
  char subject[64], text[128], outcome[40];
  snprintf(subject, sizeof subject, "soak.%s%s", worker, lanes_there ? "" : ".0");
  int length = snprintf(text, sizeof text, "%llu %ld %zu %ld %ld %s", (unsigned long long)s->key, s->count, s->size, burst,
                        pause, kind == MARKED ? "mark" : kind == FAILS ? "fail" : "end");
  const char *id = c ? c->id : "";
  running++;
  if (c) c->running++;
  const presence_request_args args = {
      .size = sizeof args,
      .subject = subject,
      .data = text,
      .data_len = (size_t)length,
      .client = id,
      .client_len = strlen(id),
      .tag = s->tag,
      .config = kind == SLOW ? narrow : plain,
  };
  int32_t status = presence_request(conns[!lanes_here], queue, &args, &s->handle, NULL);
  if (status == PRESENCE_OK) return;
  snprintf(outcome, sizeof outcome, "REFUSED_%s", status_names[-status]);
  is_over(s, outcome);
}

static void come(client *c, int64_t now) {
  int share = (int)random_below(100);
  for (c->kind = READS; share >= shares[c->kind]; c->kind++) share -= shares[c->kind];
  c->has_come = c->is_here = true;
  if (++here > most_here) most_here = here;
  if (random_below(2)) check(presence_session_open(c->id, strlen(c->id), &c->session), "presence_session_open", c->id);
  else presence_mark_online(c->id, strlen(c->id));
  c->streams = c->kind == CANCELS || random_below(4) == 0 ? 2 : 1;
  if (c->leaves_at < now) c->leaves_at = now; /* this process was stopped meanwhile */
  uint64_t stay = (uint64_t)(c->leaves_at - now) + 1;
  for (int i = 0; i < 2; i++) c->begins_at[i] = now + (int64_t)random_below(stay);
  if (c->kind != READS) c->begins_at[1] = c->begins_at[0]; /* both at once */
}

/* In the middle of its streams, or after them. */
static void leave(client *c) {
  if (c->session) presence_session_close(c->session);
  else presence_mark_offline(c->id, strlen(c->id));
  c->session = NULL;
  c->is_here = false;
  here--;
  not_gone--;
}

static void attend(client *c, int64_t now) {
  if (!c->has_come && now >= c->comes_at) come(c, now);
  if (!c->is_here) return;
  while (c->begun < c->streams && now >= c->begins_at[c->begun]) {
    /* One of two streams is cancelled, the other read to its end. */
    enum kind kind = c->kind == CANCELS && c->begun == 1 ? READS : c->kind;
    const char *worker = workers[random_below(sizeof workers / sizeof *workers)];
    uint64_t levels = random_below(8);
    c->begun++;
    begin(c, kind, worker, levels != 0, levels > 1, now);
    if (c->kind == LEAVES) c->leaves_at = now + (int64_t)random_below(500);
    if (c->kind == MARKED) c->leaves_at = now;
  }
  if (c->begun < c->streams) return;
  if (c->kind == RACES || (now >= c->leaves_at && (c->running == 0 || c->kind == LEAVES))) leave(c);
}

static void handle(const presence_event *event, int64_t now) {
  if (event->kind < PRESENCE_EVENT_DATA || event->kind > PRESENCE_EVENT_ERROR) return;
  stream *s = &streams[event->tag % SLOTS];
  if (s->is_wrong && s->tag == event->tag) return;
  if (!s->handle || s->tag != event->tag) {
    printf("{\"event\": \"violation\", \"what\": \"event %d follows the end of a stream of %s\"}\n", event->kind, s->worker);
    return;
  }
  s->last = now;
  bool is_complete = s->received == s->count, is_text = event->status == PRESENCE_REMOTE;
  const char *data = (const char *)event->data, *outcome = event->kind == PRESENCE_EVENT_END ? "END" : status_names[-event->status];
#define IS(text) (is_text && event->data_len == strlen(text) && memcmp(data, text, event->data_len) == 0)
  if (event->kind == PRESENCE_EVENT_DATA) {
    if (is_complete || event->data_len != s->size || memcmp(data, content(s->key, (uint64_t)s->received, s->size), s->size) != 0) {
      printf("{\"event\": \"violation\", \"what\": \"message %ld of %ld of a stream of %s is not what was sent\"}\n",
             s->received, s->count, s->worker);
      s->is_wrong = true;
      is_over(s, "WRONG");
      return;
    }
    s->received++;
    s->unread += event->data_len;
    return;
  }
  if (event->kind == PRESENCE_EVENT_END && !is_complete) outcome = "SHORT";
  if (IS("asked for")) outcome = s->kind != FAILS ? "UNASKED" : is_complete ? "FAILED" : "FAILED_EARLY";
  if (event->status == PRESENCE_CANCELLED && s->is_silent) outcome = "SILENT";
  is_over(s, outcome);
}

static void watch_over(stream *s, int64_t now) {
  if (s->cancelled_at && now >= s->cancelled_at) {
    s->cancelled_at = 0;
    presence_stream_cancel(s->handle);
  }
  if (s->unread && s->kind == SLOW) { /* a message at a time */
    presence_stream_consumed(s->handle, s->size);
    s->unread -= s->size;
  }
  if (now > s->last + SILENCE_MS && !s->is_silent) {
    s->is_silent = true;
    presence_stream_cancel(s->handle);
  }
}

static void wait_and_handle(bool is_tick, int64_t now) {
  static presence_event events[256];
  int64_t got = presence_queue_wait(queue, events, 256, 0);
  for (int64_t i = 0; i < got; i++) handle(&events[i], now);
  for (int i = 0; is_tick && running && i < SLOTS; i++) if (streams[i].handle) watch_over(&streams[i], now);
}

/* cycle SEED CLIENTS MS: all clients come during the first 0.4 of this time, and leave during its second half. */
static void start_cycle(const char *line, int64_t now) {
  unsigned long long seed;
  long long ms;
  if (sscanf(line, "cycle %llu %ld %lld", &seed, &client_count, &ms) != 3) check(PRESENCE_INVALID, "command", line);
  random_state = scramble(seed);
  not_gone = client_count;
  most_here = 0;
  memset(counts, 0, sizeof counts);
  for (long i = 0; i < client_count; i++) {
    clients = i ? clients : realloc(clients, sizeof *clients * (size_t)client_count);
    clients[i] = (client){.comes_at = now + (int64_t)random_below((uint64_t)ms * 4 / 10 + 1)};
    clients[i].leaves_at = now + ms / 2 + (int64_t)random_below((uint64_t)ms * 3 / 10 + 1);
    /* Never a name of another gateway: a worker marks clients of killed ones, too. */
    snprintf(clients[i].id, sizeof clients[i].id, "%s-%llx-%ld", name, seed, i);
  }
}

static void tell_cycle(void) {
  printf("{\"event\": \"cycle\", \"clients\": %ld, \"most\": %ld, \"counts\": {", client_count, most_here);
  for (int i = 0; counts[i].count; i++) printf("%s\"%s\": %ld", i ? ", " : "", counts[i].key, counts[i].count);
  puts("}}");
}

/* Has one stream from each worker, so that all lanes exist. */
static void settle(void) {
  static const char *const each[] = {"c", "go", "python", "victim"};
  for (int i = 0; i < 4; i++) {
    for (int levels = 0; levels < 4; levels++) begin(NULL, READS, each[i], levels & 1, levels & 2, now_ms());
  }
  while (running) {
    struct pollfd fd = {.fd = presence_queue_fd(queue), .events = POLLIN};
    poll(&fd, 1, TICK_MS);
    wait_and_handle(true, now_ms());
  }
  malloc_trim(0);
}

int main(int argc, char **argv) {
  char line[128];
  if (argc != 4) return 2;
  name = argv[2];
  setvbuf(stdout, NULL, _IOLBF, 0);
  setvbuf(stdin, NULL, _IONBF, 0);
  check(presence_queue_new(&queue), "queue", "");
  plain = presence_config_new(), narrow = presence_config_new();
  presence_config_set(plain, "timeout_ms", "60000"); /* never reached */
  presence_config_set(narrow, "timeout_ms", "60000");
  presence_config_set(narrow, "manual_credit", "true");
  presence_config_set(narrow, "stream_buffer_bytes", "16384");
  for (int i = 0; i < 2; i++) {
    conns[i] = open_conn(argv[1], argv[3], i == 0);
    check(presence_listen_offline(conns[i]), "listen", "");
  }
  puts("{\"event\": \"ready\"}");
  struct pollfd fds[] = {{.fd = STDIN_FILENO, .events = POLLIN}, {.fd = presence_queue_fd(queue), .events = POLLIN}};
  bool is_in_cycle = false;
  for (int64_t told = 0, ticked = 0;;) {
    poll(fds, 2, is_in_cycle ? TICK_MS : 100);
    int64_t now = now_ms();
    if (fds[0].revents) {
      if (!fgets(line, sizeof line, stdin)) break;
      if (strncmp(line, "cycle", 5) == 0) {
        start_cycle(line, now);
        is_in_cycle = true;
      } else {
        client_count = 0;
        memset(counts, 0, sizeof counts);
        settle();
        tell_cycle();
        tell_stats("quiet", conns, "");
      }
    }
    bool is_tick = now >= ticked + TICK_MS;
    if (is_tick) ticked = now;
    wait_and_handle(is_tick, now);
    for (long i = 0; is_tick && is_in_cycle && i < client_count; i++) attend(&clients[i], now);
    if (is_in_cycle && not_gone == 0 && running == 0) {
      is_in_cycle = false;
      tell_cycle();
    }
    if (now < told + STATS_MS) continue;
    told = now;
    tell_stats("stats", conns, "");
  }
  for (int i = 0; i < 2; i++) presence_close(conns[i], 1000);
  for (int i = 0; i < SLOTS; i++) presence_stream_free(streams[i].handle);
  presence_queue_free(queue);
  presence_config_free(plain), presence_config_free(narrow);
  free(clients);
}
