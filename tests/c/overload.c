/* Overload: requests beyond max_streams, and idle readers among active ones. Memory stays within the windows, and
 * others are unaffected. */
#include "content.h"

static long resident_kib(void) {
  long pages;
  FILE *statm = fopen("/proc/self/statm", "r");
  CHECK(statm);
  CHECK_EQ(fscanf(statm, "%*d %ld", &pages), 1);
  fclose(statm);
  return pages * (sysconf(_SC_PAGESIZE) / 1024);
}

static void check_resident(long before, long more_kib) {
  long now = resident_kib();
  CHECK(now <= before + more_kib || (fprintf(stderr, "from %ld to %ld KiB: ", before, now), 0));
}

/* Untaken requests ---------------------------------------------------------------------------------------------------- */

enum { PLACES = 10, LEAVE = 2000 };

/* Their gateway does not wait for an answer. A request counts towards max_streams until it is taken from the queue. */
static void untaken_requests_count_towards_max_streams(void) {
  peer worker = open_peer(), gateway = open_peer();
  presence_service *service;
  OK(presence_serve(worker.conn, worker.queue, "untaken", NULL, PLACES, 0, &service, NULL));
  for (int i = 0; i < LEAVE; i++) presence_stream_free(request(gateway, "untaken", "c", 0));
  while (stats_of(worker).requests < LEAVE) usleep(1000);
  presence_event event;
  int taken = 0;
  while (presence_queue_wait(worker.queue, &event, 1, 0) == 1) {
    if (event.kind != PRESENCE_EVENT_REQUEST) continue;
    presence_sender_free(event.sender);
    taken++;
  }
  CHECK_EQ(taken, PLACES);
  /* There is capacity again. */
  presence_stream *stream = request(gateway, "untaken", "d", 0);
  presence_sender_free(accept_request(worker));
  presence_stream_free(stream);
  presence_service_free(service);
  close_peer(worker);
  close_peer(gateway);
}

/* A flood of requests ------------------------------------------------------------------------------------------------- */

enum { RUNNING = 50, AT_ONCE = 2000 };

/* Sends `count` requests beyond max_streams: each is refused at once, and running streams go on. */
static void flood(peer worker, peer gateway, peer running, presence_sender **senders, uint64_t *sent, int count) {
  static presence_stream *streams[AT_ONCE];
  static presence_event events[AT_ONCE];
  for (int done = 0; done < count; done += AT_ONCE) {
    for (uint64_t i = 0; i < AT_ONCE; i++) {
      OK(start_request(gateway.conn, gateway.queue, "flood", "x", 1, "flood", 5, NULL, i, &streams[i], NULL));
    }
    for (int i = 0; i < RUNNING; i++) {
      unsigned char message[100];
      fill_content(message, sizeof message, (uint64_t)i, *sent);
      OK(presence_sender_send(senders[i], message, sizeof message));
    }
    for (int refused = 0; refused < AT_ONCE;) {
      int64_t found = presence_queue_wait(gateway.queue, events, AT_ONCE, TIMEOUT_MS);
      CHECK(found > 0);
      for (int64_t i = 0; i < found; i++) {
        CHECK_EQ(events[i].kind, PRESENCE_EVENT_ERROR);
        CHECK_STATUS(events[i].status, PRESENCE_BUSY);
        CHECK(is_text(events[i].data, events[i].data_len, "server busy"));
        refused++;
      }
    }
    for (int i = 0; i < RUNNING; i++) {
      presence_event event = expect(running.queue, PRESENCE_EVENT_DATA);
      CHECK_CONTENT(&event, 100, event.tag, *sent);
    }
    ++*sent;
    for (int i = 0; i < AT_ONCE; i++) presence_stream_free(streams[i]);
    expect_nothing(worker.queue);
    CHECK_EQ(stats_of(worker).senders, RUNNING);
    CHECK_EQ(stats_of(gateway).streams, 0);
  }
}

static void request_flood_is_answered_busy(void) {
  peer worker = open_peer(), gateway = open_peer(), running = open_peer();
  presence_service *service;
  presence_stream *streams[RUNNING];
  presence_sender *senders[RUNNING];
  uint64_t sent = 0;
  int count = is_long ? 100000 : 10000;
  OK(presence_serve(worker.conn, worker.queue, "flood", NULL, RUNNING, 0, &service, NULL));
  for (uint64_t i = 0; i < RUNNING; i++) {
    streams[i] = request(running, "flood", "c", i);
    senders[i] = accept_request(worker);
  }
  flood(worker, gateway, running, senders, &sent, 3 * AT_ONCE);
  long before = resident_kib();
  int64_t since = now_us();
  flood(worker, gateway, running, senders, &sent, count);
  if (is_long) {
    FIGURE("%d requests beyond max_streams: %.0f answered \"server busy\" a second, memory grew by %ld KiB", count,
           count * 1e6 / (double)(now_us() - since), resident_kib() - before);
  }
  check_resident(before, 8 << 10);
  CHECK(stats_of(worker).requests_busy >= (uint64_t)count);
  for (int i = 0; i < RUNNING; i++) OK(presence_sender_end(senders[i]));
  for (int i = 0; i < RUNNING; i++) expect(running.queue, PRESENCE_EVENT_END);
  for (int i = 0; i < RUNNING; i++) {
    presence_sender_free(senders[i]);
    presence_stream_free(streams[i]);
  }
  presence_service_free(service);
  close_peer(running);
  close_peer(gateway);
  close_peer(worker);
}

/* Idle readers -------------------------------------------------------------------------------------------------------- */

/* Workers send to idle readers until they are refused. The windows limit what is pending, for messages of any size:
 * lanes block the workers, on level 0 the streams end. */
static void idle_reader_bounds_memory(void) {
  enum { STREAMS = 20, WINDOW = 1 << 20, OVERHEAD = 64 };
  static char data[100000];
  static const size_t sizes[] = {8, 1000, 100000};
  for (int k = 0; k < 3; k++) {
    peer worker = open_peer_with("send_buffer_bytes=1048576"), gateway = open_peer();
    presence_service *service = serve(worker, "nothing");
    presence_stream *streams[STREAMS];
    presence_sender *senders[STREAMS];
    for (uint64_t i = 0; i < STREAMS; i++) {
      streams[i] = request_with(gateway, "nothing", "", i, "stream_buffer_bytes=1048576");
      senders[i] = accept_request(worker);
    }
    long before = resident_kib();
    uint64_t sent[STREAMS] = {0}, fits = WINDOW / (sizes[k] + OVERHEAD);
    /* On level 0 these anonymous streams cannot be cancelled: their workers go on for three windows. */
    uint64_t least = on_lanes() ? fits / 2 : 3 * fits;
    int64_t since = now_ms();
    bool are_all_ahead = false;
    for (int idle = 0; idle < 10 || !are_all_ahead; idle++) { /* until no sender was writable for 200 ms */
      CHECK(now_ms() - since < TIMEOUT_MS);
      are_all_ahead = true;
      for (int i = 0; i < STREAMS; i++) {
        while (sent[i] < 3 * fits && presence_sender_send(senders[i], data, sizes[k]) == PRESENCE_OK) {
          sent[i]++;
          idle = 0;
        }
        are_all_ahead &= sent[i] >= least;
      }
      usleep(20000);
    }
    for (int i = 0; i < STREAMS; i++) CHECK(sent[i] <= (on_lanes() ? fits + 1 : 3 * fits));
    if (!on_lanes()) { /* when this stream has ended, everything before it has been read */
      peer answers = second_queue(worker), asks = second_queue(gateway);
      presence_service *last = serve(answers, "last");
      run_whole_stream(answers, asks, "last");
      presence_queue_free(answers.queue);
      presence_queue_free(asks.queue);
      presence_service_free(last);
    }
    if (is_long) {
      FIGURE("20 readers that take nothing, with windows of 20480 KiB in all, messages of %zu bytes: memory grew by %ld KiB",
             sizes[k], resident_kib() - before);
    }
    /* The windows and send_buffer_bytes, with the allocator's overhead. On level 0 each message is an event of its
     * own, which takes about 140 bytes where 64 are counted. */
    check_resident(before, (STREAMS * WINDOW + (1 << 20)) / 1024 * (on_lanes() ? 3 : 5) / 2 + (8 << 10));
    for (int i = 0; i < STREAMS; i++) {
      presence_sender_free(senders[i]);
      presence_stream_free(streams[i]);
    }
    presence_service_free(service);
    close_peer(gateway);
    close_peer(worker);
  }
}

/* One slow reader among a hundred fast ones --------------------------------------------------------------------------- */

enum { FAST = 100, MESSAGE = 100 };

static peer fast_gateway;
static uint64_t fast_received; /* atomic */
static bool is_over;           /* atomic */

static void *read_fast(void *unused) {
  static presence_event events[1024];
  while (!__atomic_load_n(&is_over, __ATOMIC_SEQ_CST)) {
    int64_t count = presence_queue_wait(fast_gateway.queue, events, 1024, 10);
    CHECK(count >= 0);
    for (int64_t i = 0; i < count; i++) CHECK_EQ(events[i].kind, PRESENCE_EVENT_DATA);
    __atomic_add_fetch(&fast_received, (uint64_t)count, __ATOMIC_SEQ_CST);
  }
  return unused;
}

/* Sends to all writable senders for `ms`; returns how many messages per second the fast readers received. */
static double rate_of_fast(presence_sender **senders, int count, int64_t ms) {
  static const char data[MESSAGE] = {0};
  uint64_t before = __atomic_load_n(&fast_received, __ATOMIC_SEQ_CST);
  int64_t since = now_us();
  while (now_us() - since < ms * 1000) {
    bool any = false;
    for (int i = 0; i < count; i++) {
      int32_t status = PRESENCE_OK;
      for (int k = 0; k < 20 && status == PRESENCE_OK; k++) status = presence_sender_send(senders[i], data, MESSAGE);
      CHECK(status == PRESENCE_OK || status == PRESENCE_FULL);
      any |= status == PRESENCE_OK;
    }
    if (!any) usleep(100);
  }
  uint64_t received = __atomic_load_n(&fast_received, __ATOMIC_SEQ_CST) - before;
  return (double)received * 1e6 / (double)(now_us() - since);
}

static int by_size(const void *one, const void *other) {
  double difference = *(const double *)one - *(const double *)other;
  return (difference > 0) - (difference < 0);
}

/* On lanes. The rate is measured with the slow reader and without it, in turn. */
static void slow_reader_among_a_hundred(void) {
  enum { ROUNDS = 15, WINDOW = 1 << 16 };
  peer worker = open_peer(), slow_gateway;
  presence_service *service = serve(worker, "slow");
  presence_stream *streams[FAST];
  presence_sender *senders[FAST + 1];
  presence_event event;
  double with[ROUNDS], ratio[ROUNDS];
  int rounds = is_long ? ROUNDS : 1;
  fast_gateway = open_peer();
  slow_gateway = second_queue(fast_gateway); /* the same lane */
  fast_received = 0;
  is_over = false;
  for (uint64_t i = 0; i < FAST; i++) {
    streams[i] = request_with(fast_gateway, "slow", "", i, "stream_buffer_bytes=65536");
    senders[i] = accept_request(worker);
  }
  pthread_t reader = start_thread(read_fast, NULL);
  rate_of_fast(senders, FAST, 300);
  for (int i = 0; i < rounds; i++) {
    double without = rate_of_fast(senders, FAST, is_long ? 500 : 300);
    presence_stream *slow = request_with(slow_gateway, "slow", "", FAST, "stream_buffer_bytes=65536");
    do CHECK_EQ(presence_queue_wait(worker.queue, &event, 1, TIMEOUT_MS), 1);
    while (event.kind == PRESENCE_EVENT_WRITABLE);
    senders[FAST] = event.sender;
    with[i] = rate_of_fast(senders, FAST + 1, is_long ? 500 : 300);
    CHECK(with[i] > 0);
    ratio[i] = with[i] / without;
    uint64_t sent = presence_sender_send_count(senders[FAST]);
    CHECK(sent > 0 && sent <= WINDOW / (MESSAGE + 64) + 1); /* the window, and no more */
    presence_sender_free(senders[FAST]);
    presence_stream_free(slow);
  }
  qsort(with, (size_t)rounds, sizeof *with, by_size);
  qsort(ratio, (size_t)rounds, sizeof *ratio, by_size);
  if (is_long) {
    FIGURE("100 fast readers, and one that takes nothing: %.0f messages a second, %.0f %% of what they have without it "
           "(medians of %d)", with[rounds / 2], 100 * ratio[rounds / 2], rounds);
    CHECK(ratio[rounds / 2] >= 0.9);
  }
  __atomic_store_n(&is_over, true, __ATOMIC_SEQ_CST);
  join_thread(reader);
  for (int i = 0; i < FAST; i++) presence_sender_free(senders[i]);
  OK(presence_close(worker.conn, TIMEOUT_MS));
  for (int i = 0; i < FAST; i++) presence_stream_free(streams[i]);
  presence_service_free(service);
  presence_queue_free(worker.queue);
  presence_queue_free(slow_gateway.queue);
  close_peer(fast_gateway);
}

int main(int argc, char **argv) {
  begin(argc, argv);
  RUN_ON_BOTH(untaken_requests_count_towards_max_streams);
  RUN_ON_BOTH(request_flood_is_answered_busy);
  RUN_ON_BOTH(idle_reader_bounds_memory);
  RUN(slow_reader_among_a_hundred);
  return 0;
}
