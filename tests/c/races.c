/* Many threads request, send, end, cancel, mark and free at the same time, while connections close and nats-server
 * is killed and restarted: every stream that was not freed ends once, its messages have no gap, and nothing is left
 * over. */
#include "content.h"
#include "server.h"

enum { REQUESTERS = 6, SENDERS = 4, BATCH = 32, MAX_STREAMS = 1 << 16 };

/* The stream with this tag. `ends` is atomic. */
static struct {
  presence_stream *stream;
  uint64_t next;
  int ends;
  bool is_freed;
} table[MAX_STREAMS];

static uint64_t begun; /* atomic, like the following */
static bool is_over, is_closing;
static own_server *server; /* is killed again and again; NULL: none */
static uint64_t limit;
static peer worker, gateway;

static uint64_t load(uint64_t *number) { return __atomic_load_n(number, __ATOMIC_SEQ_CST); }

static bool is_set(bool *flag) { return __atomic_load_n(flag, __ATOMIC_SEQ_CST); }

/* The worker: one thread takes requests, and others answer them ------------------------------------------------------ */

struct job {
  presence_sender *sender;
  uint64_t tag;
};

static struct {
  pthread_mutex_t lock;
  pthread_cond_t changed;
  struct job jobs[MAX_STREAMS];
  int first, last;
  bool is_done;
} pool;

static void answer(struct job job) {
  unsigned char message[300];
  uint64_t chance = scramble(job.tag), count = chance % 60, number = 0;
  int32_t status = PRESENCE_OK;
  for (; number < count && status == PRESENCE_OK; number += status == PRESENCE_OK) {
    size_t length = 16 + scramble(chance + number) % 280;
    fill_content(message, length, job.tag, number);
    status = number % 3 == 0 ? presence_sender_send_wait(job.sender, message, length, TIMEOUT_MS)
                             : presence_sender_send(job.sender, message, length);
    if (status == PRESENCE_FULL) status = presence_sender_send_wait(job.sender, message, length, TIMEOUT_MS);
  }
  if (status == PRESENCE_OK && chance / 60 % 4 == 0) {
    status = presence_sender_error(job.sender, "enough", 6);
  } else if (status == PRESENCE_OK && chance / 60 % 4 != 1) { /* otherwise it is freed unfinished */
    status = presence_sender_send_wait(job.sender, &number, sizeof number, TIMEOUT_MS); /* how many there were */
    if (status == PRESENCE_OK) status = presence_sender_end(job.sender);
  }
  CHECK(status == PRESENCE_OK || status == PRESENCE_CANCELLED || status == PRESENCE_OFFLINE ||
        (is_set(&is_closing) && (status == PRESENCE_CLOSED || status == PRESENCE_PEER_GONE)));
  if (status != PRESENCE_OK) CHECK(presence_sender_is_closed(job.sender) || is_set(&is_closing));
  presence_sender_free(job.sender);
}

static void *answer_all(void *unused) {
  for (;;) {
    pthread_mutex_lock(&pool.lock);
    while (pool.first == pool.last && !pool.is_done) pthread_cond_wait(&pool.changed, &pool.lock);
    if (pool.first == pool.last) {
      pthread_mutex_unlock(&pool.lock);
      return unused;
    }
    struct job job = pool.jobs[pool.first++];
    pthread_mutex_unlock(&pool.lock);
    answer(job);
  }
}

static void *take_requests(void *unused) {
  presence_event events[16];
  for (;;) {
    int64_t count = presence_queue_wait(worker.queue, events, 16, 10);
    if (count == 0 && is_set(&is_over)) return unused;
    CHECK(count >= 0);
    pthread_mutex_lock(&pool.lock);
    for (int64_t i = 0; i < count; i++) {
      if (server && events[i].kind >= PRESENCE_EVENT_CONNECTED) continue;
      if (events[i].kind != PRESENCE_EVENT_REQUEST) {
        CHECK(events[i].kind == PRESENCE_EVENT_STOPPED || events[i].kind == PRESENCE_EVENT_WRITABLE);
        continue;
      }
      CHECK(pool.last < MAX_STREAMS);
      pool.jobs[pool.last].sender = events[i].sender;
      memcpy(&pool.jobs[pool.last++].tag, events[i].data, sizeof pool.jobs->tag);
    }
    pthread_cond_broadcast(&pool.changed);
    pthread_mutex_unlock(&pool.lock);
  }
}

/* The gateway: some threads request and end, and one reads ----------------------------------------------------------- */

static void *read_all(void *unused) {
  presence_event events[16];
  for (;;) {
    int64_t count = presence_queue_wait(gateway.queue, events, 16, 10);
    if (count == 0 && is_set(&is_over)) return unused;
    CHECK(count >= 0);
    for (int64_t i = 0; i < count; i++) {
      if (server && events[i].kind >= PRESENCE_EVENT_CONNECTED) continue;
      uint64_t tag = events[i].tag, *next = &table[tag].next;
      CHECK_EQ(__atomic_load_n(&table[tag].ends, __ATOMIC_SEQ_CST), 0); /* nothing follows the end */
      if (events[i].kind == PRESENCE_EVENT_DATA && events[i].data_len == sizeof *next) {
        CHECK(memcmp(events[i].data, next, sizeof *next) == 0);
        *next = UINT64_MAX;
      } else if (events[i].kind == PRESENCE_EVENT_DATA) {
        uint64_t chance = scramble(tag);
        CHECK_CONTENT(&events[i], 16 + scramble(chance + *next) % 280, tag, *next);
        ++*next;
        (void)presence_stream_consumed(events[i].stream, events[i].data_len);
      } else {
        if (events[i].kind == PRESENCE_EVENT_END) CHECK(*next == UINT64_MAX); /* everything arrived */
        else CHECK_EQ(events[i].kind, PRESENCE_EVENT_ERROR);
        if (events[i].status == PRESENCE_DISCONNECTED) CHECK(server && *next == 0); /* it was not accepted yet */
        if (events[i].status == PRESENCE_PEER_GONE || events[i].status == PRESENCE_CLOSED) CHECK(is_set(&is_closing));
        __atomic_add_fetch(&table[tag].ends, 1, __ATOMIC_SEQ_CST);
      }
    }
  }
}

/* Requests some streams at a time, and ends most of them in one of several ways. */
static void *request_all(void *client) {
  presence_config *config = presence_config_new();
  OK(presence_config_set(config, "manual_credit", "true"));
  OK(presence_config_set(config, "stream_buffer_bytes", "3000"));
  while (load(&begun) < limit) {
    uint64_t tags[BATCH];
    int count = 0;
    for (int i = 0; i < BATCH; i++) {
      uint64_t tag = __atomic_fetch_add(&begun, 1, __ATOMIC_SEQ_CST);
      CHECK(tag < MAX_STREAMS);
      int32_t status = start_request(gateway.conn, gateway.queue, "race", &tag, sizeof tag, (const char *)client,
                                        strlen((const char *)client), config, tag, &table[tag].stream, NULL);
      if (status != PRESENCE_OK) {
        if (status == PRESENCE_OFFLINE) continue; /* marked offline at this very moment */
        if (status == PRESENCE_DISCONNECTED && server) {
          usleep(1000); /* try later */
          continue;
        }
        CHECK_STATUS(status, PRESENCE_CLOSED);
        CHECK(is_set(&is_closing));
        presence_config_free(config);
        config = NULL;
        break;
      }
      tags[count++] = tag;
    }
    for (int i = 0; i < count; i++) {
      uint64_t tag = tags[i], chance = scramble(tag + 1);
      presence_stream *stream = table[tag].stream;
      if (chance % 4 == 0) usleep((useconds_t)(chance / 4 % 300));
      switch (chance / 1200 % 8) {
        case 0:
          table[tag].is_freed = true;
          presence_stream_free(stream);
          break;
        case 1:
          (void)presence_stream_cancel(stream); /* the stream may have ended */
          break;
        case 2:
          (void)presence_stream_cancel(stream);
          (void)presence_stream_consumed(stream, 1000);
          CHECK_STATUS(presence_stream_cancel(stream), PRESENCE_CLOSED);
          break;
        case 3:
          if (tag % 5 == 0) OK(mark_client_offline((const char *)client)); /* ends all of its streams at once */
          break;
        default: /* the stream runs to its end */
          break;
      }
    }
    for (int i = 0; i < count; i++) {
      int64_t since = now_ms();
      while (!table[tags[i]].is_freed && __atomic_load_n(&table[tags[i]].ends, __ATOMIC_SEQ_CST) == 0) {
        usleep(50);
        CHECK(now_ms() - since < TIMEOUT_MS);
      }
      presence_stream_free(table[tags[i]].stream);
    }
    if (!config) break;
  }
  presence_config_free(config);
  return NULL;
}

/* What closes during the race. */
enum closes { NOTHING, THE_WORKER, THE_GATEWAY, BOTH };

static void *close_conn(void *conn) {
  int32_t status = presence_close((presence_conn *)conn, TIMEOUT_MS);
  CHECK_STATUS(status, PRESENCE_OK);
  return NULL;
}

static void race(uint64_t streams, enum closes closes) {
  static char clients[REQUESTERS][2] = {"a", "b", "c", "c", "c", ""}; /* one client thrice, and none */
  memset(table, 0, sizeof table);
  memset(&pool, 0, sizeof pool);
  CHECK_EQ(pthread_mutex_init(&pool.lock, NULL), 0);
  CHECK_EQ(pthread_cond_init(&pool.changed, NULL), 0);
  begun = 0;
  limit = streams;
  is_over = is_closing = false;
  worker = server ? open_peer_at(server->url, NULL) : open_peer();
  gateway = server ? open_peer_at(server->url, NULL) : open_peer();
  presence_service *service = serve(worker, "race");
  pthread_t requesters[REQUESTERS], senders[SENDERS];
  pthread_t reader = start_thread(read_all, NULL), taker = start_thread(take_requests, NULL);
  for (int i = 0; i < SENDERS; i++) senders[i] = start_thread(answer_all, NULL);
  for (int i = 0; i < REQUESTERS; i++) requesters[i] = start_thread(request_all, clients[i]);

  if (closes != NOTHING) {
    while (load(&begun) < streams / 2) usleep(100);
    __atomic_store_n(&is_closing, true, __ATOMIC_SEQ_CST);
    pthread_t closer = start_thread(close_conn, closes & THE_WORKER ? worker.conn : gateway.conn);
    if (closes == BOTH) close_conn(gateway.conn);
    join_thread(closer);
  }
  while (server && load(&begun) < streams) {
    uint64_t next = load(&begun) + 200 < streams ? load(&begun) + 200 : streams;
    while (load(&begun) < next) usleep(100);
    uint64_t connects = stats_of(worker).connects;
    kill_server(server);
    start_server(server);
    while (stats_of(worker).connects == connects || stats_of(gateway).connects == connects) usleep(100); /* both are back */
  }
  for (int i = 0; i < REQUESTERS; i++) join_thread(requesters[i]);
  /* What is in flight still arrives, and nothing is left over. */
  int64_t since = now_ms();
  while ((!(closes & THE_WORKER) && stats_of(worker).senders > 0) ||
         (!(closes & THE_GATEWAY) && stats_of(gateway).streams > 0)) {
    usleep(1000);
    CHECK(now_ms() - since < TIMEOUT_MS);
  }
  if (!(closes & THE_WORKER)) close_conn(worker.conn);
  if (!(closes & THE_GATEWAY)) close_conn(gateway.conn);
  __atomic_store_n(&is_over, true, __ATOMIC_SEQ_CST);
  join_thread(reader);
  join_thread(taker);
  pthread_mutex_lock(&pool.lock);
  pool.is_done = true;
  pthread_cond_broadcast(&pool.changed);
  pthread_mutex_unlock(&pool.lock);
  for (int i = 0; i < SENDERS; i++) join_thread(senders[i]);
  for (uint64_t i = 0; i < load(&begun); i++) CHECK(table[i].ends <= 1);
  presence_service_free(service);
  presence_queue_free(worker.queue);
  presence_queue_free(gateway.queue);
}

static void all_operations_race(void) { race(20000, NOTHING); }

static void operations_race_a_close(void) {
  for (int round = 0; round < 15; round++) race(500 + 200 * (uint64_t)round, (enum closes)(1 + round % 3));
}

static void operations_race_server_restarts(void) {
  own_server own = new_server();
  server = &own;
  race(12000, NOTHING);
  kill_server(server);
  server = NULL;
}

int main(int argc, char **argv) {
  begin(argc, argv);
  RUN(all_operations_race);
  RUN(operations_race_a_close);
  RUN(operations_race_server_restarts);
  return 0;
}
