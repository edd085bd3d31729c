/* Threads send as fast as they can. No send succeeds that begins after mark_client_offline returned, or after
 * another process's announcement took effect here. */
#include "server.h"
#include <sched.h>

enum { BATCH = 256, THREADS = 2, BEFORE = 50 };


/* One sender, on which all threads send until they see its mark, and `sends_after` times more. (After BEFORE
 * accepted sends they yield, so that the sender is writable when the mark comes.) All fields are atomic. */
static struct {
  presence_sender *sender;
  int begun;  /* the number of threads that send on it */
  int marked; /* set after mark_client_offline returned: a send that begins later must be refused. So must one that
               * begins after its thread has read an end in the status word */
} slots[BATCH];

static uint64_t next_slot; /* slots below this number are complete. Atomic, like the following */
static uint64_t passed[THREADS];
static bool is_over;
static uint64_t sent, accepted, refused_after, met;
static int sends_after;

/* Sends in one of three ways, and returns how many messages that were. */
static int64_t send_somehow(uint64_t way, presence_sender *sender, int32_t *status) {
  static const size_t lengths[] = {8, 8, 8, 8};
  static const char data[32] = "0123456 0123456 0123456 0123456";
  if (way % 4 == 1) {
    int64_t count = presence_sender_send_many(sender, data, lengths, 4);
    *status = count < 0 ? (int32_t)count : PRESENCE_OK;
    return count < 0 ? 1 : count;
  }
  *status = way % 4 == 2 ? presence_sender_send_wait(sender, data, 8, 0) : presence_sender_send(sender, data, 8);
  if (*status == PRESENCE_TIMEOUT) *status = PRESENCE_FULL; /* send_wait's status for a full sender */
  return 1;
}

static void *send_on_all(void *number) {
  uint64_t own = *(uint64_t *)number;
  for (uint64_t slot = 0;; slot++) {
    uint64_t own_sent = 0, own_accepted = 0, own_after = 0, own_met = 0;
    while (__atomic_load_n(&next_slot, __ATOMIC_ACQUIRE) <= slot) {
      if (__atomic_load_n(&is_over, __ATOMIC_SEQ_CST)) return NULL;
      sched_yield();
    }
    presence_sender *sender = slots[slot % BATCH].sender;
    const uint32_t *word = presence_sender_status_word(sender);
    int *marked = &slots[slot % BATCH].marked;
    __atomic_add_fetch(&slots[slot % BATCH].begun, 1, __ATOMIC_SEQ_CST);
    bool was_refused = false, was_accepted = false;
    int before = 0;
    for (int after = 0; after < sends_after;) {
      bool is_marked = __atomic_load_n(marked, __ATOMIC_SEQ_CST);
      uint32_t stopped = __atomic_load_n(word, __ATOMIC_RELAXED);
      int32_t status;
      int64_t count = send_somehow(slot + own, sender, &status);
      own_sent += (uint64_t)count;
      if (status == PRESENCE_OK) {
        CHECK(!is_marked && !stopped && !was_refused);
        own_accepted += (uint64_t)count;
        was_accepted = true;
        if (++before > BEFORE) sched_yield();
      } else if (status == PRESENCE_FULL) {
        CHECK(!is_marked && !stopped && !was_refused);
        own_sent--; /* this send raced nothing */
        was_accepted = false;
        sched_yield();
      } else {
        CHECK_STATUS(status, PRESENCE_OFFLINE);
        own_met += !was_refused && was_accepted; /* the send before was accepted: the mark came in between */
        was_refused = true;
        own_after += is_marked;
        after += is_marked;
      }
    }
    __atomic_add_fetch(&sent, own_sent, __ATOMIC_SEQ_CST);
    __atomic_add_fetch(&accepted, own_accepted, __ATOMIC_SEQ_CST);
    __atomic_add_fetch(&refused_after, own_after, __ATOMIC_SEQ_CST);
    __atomic_add_fetch(&met, own_met, __ATOMIC_SEQ_CST);
    __atomic_store_n(&passed[own], slot + 1, __ATOMIC_SEQ_CST);
  }
}

/* Takes all events; the sender of a request goes to the slot that the request names. */
static int take(peer self) {
  static presence_event events[1000];
  int requests = 0;
  int64_t count;
  while ((count = presence_queue_wait(self.queue, events, 1000, 0)) > 0) {
    for (int64_t i = 0; i < count; i++) {
      uint64_t place;
      if (events[i].kind != PRESENCE_EVENT_REQUEST) continue;
      memcpy(&place, events[i].data, sizeof place);
      CHECK(!slots[place].sender);
      slots[place].sender = events[i].sender;
      requests++;
    }
  }
  OK((int32_t)count);
  return requests;
}

/* A peer that is a socket announces that a client is offline; returns when the sender has stopped. */
static void announce(int peer, const char *id, presence_sender *sender) {
  char line[60];
  int size = snprintf(line, sizeof line, "PUB client.offline %zu\r\n%s\r\n", strlen(id), id);
  CHECK_EQ(send(peer, line, (size_t)size, MSG_NOSIGNAL), size);
  while (status_word(sender) == 0) sched_yield();
}

static int connect_by_hand(void) {
  static const char hello[] = "CONNECT {\"verbose\":false}\r\n";
  const char *port = strrchr(url, ':');
  CHECK(port);
  struct sockaddr_in address = local(atoi(port + 1));
  int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  CHECK_EQ(connect(fd, (struct sockaddr *)&address, sizeof address), 0);
  CHECK_EQ(send(fd, hello, sizeof hello - 1, MSG_NOSIGNAL), sizeof hello - 1);
  return fd;
}

/* Clients leave while threads send, until the threads have made `sends` sends. */
static void race(uint64_t sends, bool is_announced) {
  peer worker = open_peer(), gateway = open_peer();
  presence_service *service = serve(worker, "mark");
  presence_config *config = presence_config_new();
  presence_stream *streams[BATCH];
  pthread_t threads[THREADS];
  uint64_t numbers[THREADS], seed = 1;
  int peer = is_announced ? connect_by_hand() : -1;
  OK(presence_config_set(config, "stream_buffer_bytes", "1048576"));
  next_slot = sent = accepted = refused_after = met = 0;
  is_over = false;
  for (uint64_t i = 0; i < THREADS; i++) {
    numbers[i] = i;
    passed[i] = 0;
    threads[i] = start_thread(send_on_all, &numbers[i]);
  }
  while (sent < sends) { /* all threads have passed the batch: none writes `sent` now */
    memset(slots, 0, sizeof slots);
    for (uint64_t i = 0; i < BATCH; i++) {
      char id[24];
      snprintf(id, sizeof id, "%d", (int)i);
      OK(start_request(gateway.conn, gateway.queue, "mark", &i, sizeof i, id, strlen(id), config, i, &streams[i], NULL));
    }
    for (int requests = 0; requests < BATCH; requests += take(worker)) usleep(100);
    for (int i = 0; i < BATCH; i++) {
      char id[24];
      snprintf(id, sizeof id, "%d", i);
      __atomic_add_fetch(&next_slot, 1, __ATOMIC_SEQ_CST);
      while (__atomic_load_n(&slots[i].begun, __ATOMIC_SEQ_CST) < THREADS) sched_yield();
      seed = seed * 6364136223846793005ULL + 1442695040888963407ULL;
      for (uint64_t delay = seed >> 54; delay > 0; delay--) __asm__ volatile("" ::: "memory"); /* at any moment of a send */
      if (is_announced) announce(peer, id, slots[i].sender);
      else OK(mark_client_offline(id));
      __atomic_store_n(&slots[i].marked, 1, __ATOMIC_SEQ_CST);
    }
    for (int i = 0; i < THREADS; i++) {
      while (__atomic_load_n(&passed[i], __ATOMIC_SEQ_CST) < next_slot) sched_yield();
    }
    for (int i = 0; i < BATCH; i++) {
      presence_sender_free(slots[i].sender);
      presence_stream_free(streams[i]);
    }
    take(worker);
    take(gateway);
  }
  __atomic_store_n(&is_over, true, __ATOMIC_SEQ_CST);
  for (int i = 0; i < THREADS; i++) join_thread(threads[i]);
  CHECK_EQ(refused_after, next_slot * THREADS * (uint64_t)sends_after);
  CHECK(accepted > 0 && met > next_slot / 20); /* marks and sends did race */
  if (is_announced) close(peer);
  presence_config_free(config);
  presence_service_free(service);
  close_peer(gateway);
  close_peer(worker);
}

static void run(const char *what, uint64_t sends, bool is_announced) {
  int64_t since = now_us();
  sends_after = is_long ? 4000 : 500;
  race(sends, is_announced);
  if (!is_long) return;
  FIGURE("%llu sends of two threads raced %llu %s (%.0f s): %llu accepted before; %llu begun after it, of which 0 accepted; "
         "in %llu of %llu cases it followed an accepted send",
         (unsigned long long)sent, (unsigned long long)next_slot, what, (double)(now_us() - since) / 1e6,
         (unsigned long long)accepted, (unsigned long long)refused_after, (unsigned long long)met,
         (unsigned long long)next_slot * THREADS);
}

static void no_send_after_the_mark(void) { run("marks", is_long ? 1000000000 : 4000000, false); }
static void no_send_after_the_announcement(void) { run("announcements", is_long ? 100000000 : 1000000, true); }

int main(int argc, char **argv) {
  begin(argc, argv);
  RUN_ON_BOTH(no_send_after_the_mark);
  RUN_ON_BOTH(no_send_after_the_announcement);
  return 0;
}
