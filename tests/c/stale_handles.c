/* Stale handles: every handle that was closed or freed is recognised, from any thread, any number of times. */
#include "peer.h"

/* Makes every call on a closed connection. */
static void check_closed_conn(presence_conn *conn, presence_queue *queue) {
  presence_stats stats;
  presence_service *service = NULL;
  presence_stream *stream = NULL;
  presence_error error;
  CHECK_STATUS(presence_listen_offline(conn), PRESENCE_CLOSED);
  CHECK_STATUS(presence_conn_watch(conn, queue, 0), PRESENCE_CLOSED);
  CHECK_STATUS(presence_conn_stats(conn, &stats), PRESENCE_CLOSED);
  CHECK_STATUS(presence_serve(conn, queue, "s", "", 0, 0, &service, &error), PRESENCE_CLOSED);
  CHECK_EQ(error.status, PRESENCE_CLOSED);
  CHECK_STATUS(start_request(conn, queue, "s", "", 0, "c", 1, NULL, 0, &stream, &error), PRESENCE_CLOSED);
  CHECK_CONTAINS(error.message, "presence_conn");
  CHECK_STATUS(presence_close(conn, -1), PRESENCE_CLOSED);
  CHECK(!service && !stream && !is_client_online("c"));
}

static void check_closed_queue(presence_conn *conn, presence_queue *queue) {
  presence_event event;
  presence_service *service = NULL;
  presence_stream *stream = NULL;
  CHECK_STATUS(presence_queue_fd(queue), PRESENCE_CLOSED);
  CHECK_STATUS(presence_queue_wait(queue, &event, 1, -1), PRESENCE_CLOSED);
  CHECK_STATUS(presence_watch(queue, 0), PRESENCE_CLOSED);
  CHECK_STATUS(presence_conn_watch(conn, queue, 0), PRESENCE_CLOSED);
  CHECK_STATUS(presence_serve(conn, queue, "s", "", 0, 0, &service, NULL), PRESENCE_CLOSED);
  CHECK_STATUS(start_request(conn, queue, "s", "", 0, "c", 1, NULL, 0, &stream, NULL), PRESENCE_CLOSED);
  presence_queue_wake(queue);
  presence_queue_free(queue);
  CHECK(!service && !stream && !is_client_online("c"));
}

static void calls_on_stale_handles_return_closed(void) {
  pair both = open_pair("c");
  presence_session *session;
  OK(presence_session_open("d", 1, &session));
  CHECK(presence_session_is_open(session));
  presence_session_close(session);
  presence_session_close(session);
  CHECK(!presence_session_is_open(session));

  presence_service_free(both.service);
  CHECK_STATUS(presence_service_stop(both.service), PRESENCE_CLOSED);
  presence_service_free(both.service);

  OK(presence_sender_end(both.sender));
  expect(both.gateway.queue, PRESENCE_EVENT_END);
  presence_stream_free(both.stream);
  CHECK_STATUS(presence_stream_cancel(both.stream), PRESENCE_CLOSED);
  CHECK_STATUS(presence_stream_consumed(both.stream, 1), PRESENCE_CLOSED);
  presence_stream_free(both.stream);

  presence_queue_free(both.gateway.queue);
  check_closed_queue(both.gateway.conn, both.gateway.queue);
  OK(presence_close(both.gateway.conn, TIMEOUT_MS));
  check_closed_conn(both.gateway.conn, both.worker.queue);

  presence_sender_free(both.sender);
  close_peer(both.worker);
}

/* A pointer that never was a handle, or is one of another type, is refused like a closed one. */
static void pointers_that_never_were_handles_return_closed(void) {
  peer self = open_peer();
  presence_event event;
  int on_the_stack = 0;
  void *pointers[] = {self.conn, self.queue, &on_the_stack, (void *)1, (void *)UINTPTR_MAX};
  for (int i = 0; i < 5; i++) {
    presence_session_close((presence_session *)pointers[i]);
    presence_service_free((presence_service *)pointers[i]);
    presence_stream_free((presence_stream *)pointers[i]);
    CHECK(presence_service_stop((presence_service *)pointers[i]) != PRESENCE_OK);
    CHECK(presence_stream_cancel((presence_stream *)pointers[i]) != PRESENCE_OK);
    CHECK(presence_stream_consumed((presence_stream *)pointers[i], 1) != PRESENCE_OK);
    if (pointers[i] != self.conn) CHECK(presence_close((presence_conn *)pointers[i], 0) != PRESENCE_OK);
    if (pointers[i] != self.queue) CHECK(presence_queue_wait((presence_queue *)pointers[i], &event, 1, 0) < 0);
  }
  close_peer(self);
}

/* Starts eight threads with one body, lets them all go at once, and adds up what they return. */
enum { THREADS = 8 };
static pthread_barrier_t all_ready;

static void wait_for_all(void) {
  int status = pthread_barrier_wait(&all_ready);
  CHECK(status == 0 || status == PTHREAD_BARRIER_SERIAL_THREAD);
}

static void run_in_all(void *(*body)(void *), void *argument) {
  pthread_t threads[THREADS];
  CHECK_EQ(pthread_barrier_init(&all_ready, NULL, THREADS), 0);
  for (int i = 0; i < THREADS; i++) threads[i] = start_thread(body, argument);
  for (int i = 0; i < THREADS; i++) join_thread(threads[i]);
  CHECK_EQ(pthread_barrier_destroy(&all_ready), 0);
}

static int succeeded, refused; /* atomic */

static void count_status(int32_t status) {
  if (status == PRESENCE_OK) __atomic_add_fetch(&succeeded, 1, __ATOMIC_SEQ_CST);
  else if (status == PRESENCE_CLOSED) __atomic_add_fetch(&refused, 1, __ATOMIC_SEQ_CST);
  else CHECK_STATUS(status, PRESENCE_OK);
}

static void check_one_succeeded(void) {
  CHECK_EQ(succeeded, 1);
  CHECK_EQ(refused, THREADS - 1);
  succeeded = refused = 0;
}

static void *close_conn(void *conn) {
  wait_for_all();
  count_status(presence_close((presence_conn *)conn, TIMEOUT_MS));
  return NULL;
}

static void *stop_service(void *service) {
  wait_for_all();
  count_status(presence_service_stop((presence_service *)service));
  return NULL;
}

static void *cancel_stream(void *stream) {
  wait_for_all();
  count_status(presence_stream_cancel((presence_stream *)stream));
  return NULL;
}

static void *end_by_error(void *sender) {
  wait_for_all();
  count_status(presence_sender_error((presence_sender *)sender, "x", 1));
  return NULL;
}

/* Eight threads end the same stream: one of them does, and it ends once. */
static void eight_threads_end_one_stream(void) {
  for (int round = 0; round < 20; round++) {
    pair both = open_pair("c");
    presence_stream *cancelled = request(both.gateway, "pair", "d", 2);
    presence_sender *stopped = accept_request(both.worker);
    run_whole_stream(both.worker, both.gateway, "pair");
    run_in_all(cancel_stream, cancelled);
    check_one_succeeded();
    expect_status(both.gateway.queue, PRESENCE_EVENT_ERROR, PRESENCE_CANCELLED);
    expect_status(both.worker.queue, PRESENCE_EVENT_STOPPED, CANCELLED);
    run_in_all(end_by_error, both.sender);
    check_one_succeeded();
    expect_status(both.gateway.queue, PRESENCE_EVENT_ERROR, PRESENCE_REMOTE);
    run_in_all(stop_service, both.service);
    check_one_succeeded();
    run_in_all(close_conn, both.worker.conn);
    check_one_succeeded();
    expect_nothing(both.gateway.queue);
    presence_sender_free(stopped);
    presence_sender_free(both.sender);
    presence_stream_free(cancelled);
    presence_stream_free(both.stream);
    presence_service_free(both.service);
    presence_queue_free(both.worker.queue);
    close_peer(both.gateway);
  }
}

static void *free_session(void *session) {
  wait_for_all();
  presence_session_close((presence_session *)session);
  return NULL;
}

static void *free_service(void *service) {
  wait_for_all();
  presence_service_free((presence_service *)service);
  return NULL;
}

static void *free_stream(void *stream) {
  wait_for_all();
  presence_stream_free((presence_stream *)stream);
  return NULL;
}

static void *free_queue(void *queue) {
  wait_for_all();
  presence_queue_free((presence_queue *)queue);
  return NULL;
}

static void *wait_on_queue(void *queue) {
  presence_event event;
  while (presence_queue_wait((presence_queue *)queue, &event, 1, -1) >= 0) continue;
  return NULL;
}

/* Eight threads free a handle that is in use: it is freed once, and its users notice. */
static void eight_threads_free_one_handle(void) {
  for (int round = 0; round < 20; round++) {
    pair both = open_pair("c");
    presence_session *session, *other;
    presence_stats stats;
    run_whole_stream(both.worker, both.gateway, "pair");
    OK(presence_session_open("d", 1, &session));
    OK(presence_session_open("d", 1, &other));
    run_in_all(free_session, session);
    CHECK(is_client_online("d")); /* the second free affected no other session */
    presence_session_close(other);
    CHECK(!is_client_online("d"));

    run_in_all(free_stream, both.stream);
    expect_status(both.worker.queue, PRESENCE_EVENT_STOPPED, CANCELLED);
    expect_nothing(both.worker.queue);
    expect_nothing(both.gateway.queue);
    run_in_all(free_service, both.service);
    CHECK_STATUS(presence_service_stop(both.service), PRESENCE_CLOSED);

    pthread_t waiter = start_thread(wait_on_queue, both.gateway.queue);
    run_in_all(free_queue, both.gateway.queue);
    join_thread(waiter);
    CHECK_STATUS(presence_queue_fd(both.gateway.queue), PRESENCE_CLOSED);
    OK(presence_conn_stats(both.gateway.conn, &stats));
    CHECK_EQ(stats.streams, 0);
    presence_sender_free(both.sender);
    OK(presence_close(both.gateway.conn, TIMEOUT_MS));
    close_peer(both.worker);
  }
}

/* The thread that ends the stream on which the others send. */
enum how { BY_END, BY_ERROR, BY_MARK, BY_CLOSE, HOWS };
static enum how how;
static presence_conn *worker_conn;
static int threads_begun;

/* The first thread ends the stream after some messages; the others send until they are refused. */
static void *send_or_end(void *argument) {
  presence_sender *sender = (presence_sender *)argument;
  wait_for_all();
  int32_t status = PRESENCE_OK;
  if (__atomic_fetch_add(&threads_begun, 1, __ATOMIC_SEQ_CST) == 0) {
    while (presence_sender_send_count(sender) < 100) usleep(100);
    if (how == BY_END) OK(presence_sender_end(sender));
    if (how == BY_ERROR) OK(presence_sender_error(sender, "x", 1));
    if (how == BY_MARK) OK(mark_client_offline("c"));
    if (how == BY_CLOSE) OK(presence_close(worker_conn, TIMEOUT_MS));
    CHECK(presence_sender_is_closed(sender));
    return NULL;
  }
  while (status == PRESENCE_OK) {
    status = presence_sender_send_wait(sender, "message", 7, -1);
    if (status == PRESENCE_OK) count_status(status);
  }
  CHECK_STATUS(status, how == BY_MARK ? PRESENCE_OFFLINE : PRESENCE_CLOSED);
  return NULL;
}

/* Eight threads use a sender and one ends it: what was accepted before arrives, then the end, and nothing after it. */
static void seven_threads_send_while_one_ends(void) {
  for (int round = 0; round < 3 * HOWS; round++) {
    how = (enum how)(round % HOWS);
    pair both = open_pair("c");
    worker_conn = both.worker.conn;
    /* A client that leaves before its gateway knows of the lane may be reported as CANCELLED instead of OFFLINE. */
    OK(send_text(both.sender, "first"));
    expect_data(both.gateway.queue, "first");
    succeeded = 1;
    threads_begun = 0;
    run_in_all(send_or_end, both.sender);
    CHECK_EQ(presence_sender_send_count(both.sender), succeeded);
    presence_event event;
    int64_t received = 1;
    while (presence_queue_wait(both.gateway.queue, &event, 1, TIMEOUT_MS) == 1 && event.kind == PRESENCE_EVENT_DATA) {
      CHECK(is_text(event.data, event.data_len, "message"));
      received++;
    }
    CHECK_EQ(event.kind, how == BY_END ? PRESENCE_EVENT_END : PRESENCE_EVENT_ERROR);
    if (how != BY_MARK) CHECK_EQ(received, succeeded); /* a client that left reads no more */
    expect_nothing(both.gateway.queue);
    succeeded = 0;
    presence_sender_free(both.sender);
    presence_stream_free(both.stream);
    presence_service_free(both.service);
    if (how == BY_CLOSE) presence_queue_free(both.worker.queue);
    else close_peer(both.worker);
    close_peer(both.gateway);
  }
}

/* A connection closes while eight threads use it in every way. */
static peer used;

static void *use_conn(void *unused) {
  wait_for_all();
  for (;;) {
    presence_service *service;
    presence_stream *stream;
    presence_stats stats;
    int32_t status = presence_serve(used.conn, used.queue, "used", "", 0, 0, &service, NULL);
    if (status == PRESENCE_OK) presence_service_free(service);
    CHECK(status == PRESENCE_OK || status == PRESENCE_CLOSED);
    status = start_request(used.conn, used.queue, "used", "x", 1, "c", 1, NULL, 0, &stream, NULL);
    if (status == PRESENCE_OK) presence_stream_free(stream);
    CHECK(status == PRESENCE_OK || status == PRESENCE_CLOSED || status == PRESENCE_DISCONNECTED);
    if (presence_conn_stats(used.conn, &stats) == PRESENCE_CLOSED) return unused;
    presence_event event;
    int64_t count = presence_queue_wait(used.queue, &event, 1, 0);
    if (count == 1 && event.kind == PRESENCE_EVENT_REQUEST) presence_sender_free(event.sender);
    CHECK(count >= 0 || count == PRESENCE_BUSY);
  }
}

static void *close_used(void *unused) {
  while (stats_of(used).requests < 10) usleep(100);
  OK(presence_close(used.conn, TIMEOUT_MS));
  return unused;
}

static void close_while_eight_threads_use_the_connection(void) {
  for (int round = 0; round < 20; round++) {
    used = open_peer();
    pthread_t closer = start_thread(close_used, NULL);
    run_in_all(use_conn, NULL);
    join_thread(closer);
    presence_event event;
    while (presence_queue_wait(used.queue, &event, 1, 0) == 1) {
      if (event.kind == PRESENCE_EVENT_REQUEST) presence_sender_free(event.sender);
    }
    CHECK_EQ(presence_online_count(), 0); /* whatever was starting has ended */
    presence_queue_free(used.queue);
  }
}

int main(int argc, char **argv) {
  begin(argc, argv);
  RUN_ON_BOTH(calls_on_stale_handles_return_closed);
  RUN(pointers_that_never_were_handles_return_closed);
  RUN_ON_BOTH(eight_threads_end_one_stream);
  RUN_ON_BOTH(eight_threads_free_one_handle);
  RUN_ON_BOTH(seven_threads_send_while_one_ends);
  RUN_ON_BOTH(close_while_eight_threads_use_the_connection);
  return 0;
}
