/* What a host does to its process: fork, exit, signals. Each test runs in a process that makes its own first
 * connection. */
#include "peer.h"
#include <arpa/inet.h>
#include <dirent.h>
#include <netinet/in.h>
#include <pthread.h>
#include <sched.h>
#include <sys/socket.h>

/* Waits for a forked child, which must exit with 0; its alarm ends it if it hangs. */
static void expect_child(pid_t child) { expect_exit(child, 0); }

/* Prepares a forked child: alarms are not inherited. */
static void begin_child(const char *name) {
  alarm(60);
  running = name;
}

/* One stream from request to end, on a subject of this process: it uses everything that a connection needs. */
static void a_whole_stream(const char *client) {
  char subject[32];
  snprintf(subject, sizeof subject, "life.%d", (int)getpid());
  peer worker = open_peer(), gateway = open_peer();
  presence_service *service = serve(worker, subject);
  presence_stream *stream = request(gateway, subject, client, 1);
  presence_sender *sender = accept_request(worker);
  CHECK(is_client_online(client));
  OK(send_text(sender, "message"));
  OK(presence_sender_end(sender));
  expect_data(gateway.queue, "message");
  expect(gateway.queue, PRESENCE_EVENT_END);
  CHECK(!is_client_online(client));
  presence_sender_free(sender);
  presence_stream_free(stream);
  presence_service_free(service);
  close_peer(gateway);
  close_peer(worker);
}

static void marks_work(void) {
  CHECK_EQ(presence_online_count(), 0);
  OK(mark_client_online("own"));
  CHECK(is_client_online("own"));
  CHECK_EQ(presence_online_count(), 1);
  OK(mark_client_offline("own"));
  CHECK_EQ(presence_online_count(), 0);
}

/* Fork -------------------------------------------------------------------------------------------------------------- */

static void role_fork_before_any_call(void) {
  pid_t child = fork();
  if (child == 0) {
    begin_child("fork_first, child");
    marks_work();
    a_whole_stream("own");
    exit(0);
  }
  a_whole_stream("parent's");
  expect_child(child);
}

/* The parent has used marks, a session and a queue, but has never connected. */
static void role_fork_after_marks_and_sessions(void) {
  presence_session *session;
  presence_queue *queue;
  presence_event event;
  OK(mark_client_online("marked"));
  OK(presence_session_open("tabs", 4, &session));
  OK(presence_queue_new(&queue));
  OK(presence_watch(queue, 0));
  for (int i = 0; i < 2; i++) CHECK(is_client_online("marked")); /* remembered by the thread, but not in the child */
  pid_t child = fork();
  if (child == 0) {
    begin_child("fork_after_marks, child");
    CHECK(!is_client_online("marked") && !is_client_online("tabs"));
    marks_work();
    CHECK_STATUS(presence_queue_wait(queue, &event, 1, 0), PRESENCE_FORKED);
    CHECK_STATUS(presence_queue_fd(queue), PRESENCE_FORKED);
    presence_session_close(session);
    presence_queue_free(queue);
    a_whole_stream("own");
    /* A child of the child, whose parent has connected now. */
    pid_t grandchild = fork();
    if (grandchild == 0) {
      begin_child("fork_after_marks, grandchild");
      marks_work();
      presence_conn *conn = NULL;
      CHECK_STATUS(presence_connect(url, NULL, &conn, NULL), PRESENCE_FORKED);
      CHECK(!conn);
      exit(0);
    }
    expect_child(grandchild);
    exit(0);
  }
  expect_child(child);
  CHECK(is_client_online("marked") && is_client_online("tabs"));
  expect_nothing(queue); /* nothing of what the child did */
  presence_session_close(session);
  expect(queue, PRESENCE_EVENT_OFFLINE);
  OK(mark_client_offline("marked"));
  presence_queue_free(queue);
  a_whole_stream("parent's");
}

static void all_handles_are_forked(pair both, presence_session *session) {
  presence_conn *conn = both.worker.conn;
  presence_queue *queue = both.worker.queue, *own = NULL;
  presence_event event;
  presence_stats stats;
  presence_stream *stream = NULL;
  presence_service *service = NULL;
  presence_error error;
  const char *value;
  size_t length;

  CHECK_STATUS(presence_listen_offline(conn), PRESENCE_FORKED);
  CHECK_STATUS(presence_conn_stats(conn, &stats), PRESENCE_FORKED);
  OK(presence_queue_new(&own)); /* a handle of the child's own */
  CHECK_STATUS(presence_conn_watch(conn, own, 0), PRESENCE_FORKED);
  CHECK_STATUS(presence_serve(conn, own, "pair", NULL, 0, 0, &service, &error), PRESENCE_FORKED);
  CHECK_EQ(error.status, PRESENCE_FORKED);
  CHECK_STATUS(start_request(conn, own, "pair", NULL, 0, "c", 1, NULL, 0, &stream, &error), PRESENCE_FORKED);
  CHECK(!service && !stream && *error.message);
  CHECK_STATUS(presence_queue_wait(queue, &event, 1, -1), PRESENCE_FORKED);
  CHECK_STATUS(presence_queue_fd(queue), PRESENCE_FORKED);
  CHECK_STATUS(presence_watch(queue, 0), PRESENCE_FORKED);
  presence_queue_wake(queue);
  CHECK_STATUS(presence_service_stop(both.service), PRESENCE_FORKED);
  CHECK_STATUS(presence_stream_cancel(both.stream), PRESENCE_FORKED);
  CHECK_STATUS(presence_stream_consumed(both.stream, 1), PRESENCE_FORKED);
  CHECK_STATUS(presence_sender_send(both.sender, "x", 1), PRESENCE_FORKED);
  CHECK_STATUS(presence_sender_send_wait(both.sender, "x", 1, -1), PRESENCE_FORKED);
  CHECK_STATUS(presence_sender_error(both.sender, "x", 1), PRESENCE_FORKED);
  CHECK_STATUS(presence_sender_error_code(both.sender, 1, "x", 1), PRESENCE_FORKED);
  CHECK_STATUS(presence_sender_end(both.sender), PRESENCE_FORKED);
  CHECK_STATUS(presence_sender_header(both.sender, "Connect-ID", &value, &length), PRESENCE_FORKED);
  CHECK(presence_sender_is_closed(both.sender)); /* it can send no more, with any status */

  presence_conn *other = NULL;
  memset(&error, 0, sizeof error);
  CHECK_STATUS(presence_connect(url, NULL, &other, &error), PRESENCE_FORKED);
  CHECK(!other);
  CHECK_CONTAINS(error.message, "fork");

  presence_sender_free(both.sender);
  presence_stream_free(both.stream);
  presence_service_free(both.service);
  presence_session_close(session);
  presence_queue_free(queue);
  CHECK_STATUS(presence_close(conn, -1), PRESENCE_FORKED);
  presence_queue_free(own);
}

static void role_fork_while_connected(void) {
  presence_session *session;
  pair both = open_pair("c");
  OK(presence_session_open("tabs", 4, &session));
  OK(presence_watch(both.gateway.queue, 0));
  uint64_t announced = stats_of(both.worker).offline_out + stats_of(both.gateway).offline_out;
  pid_t child = fork();
  if (child == 0) {
    begin_child("fork_after_connect, child");
    CHECK(!is_client_online("c") && !is_client_online("tabs"));
    all_handles_are_forked(both, session);
    marks_work();
    OK(mark_client_offline("c")); /* the child's own client of this name */
    exit(0);
  }
  expect_child(child);
  /* The parent is unaffected. */
  CHECK(is_client_online("c") && is_client_online("tabs"));
  OK(send_text(both.sender, "goes on"));
  expect_data(both.gateway.queue, "goes on");
  expect_nothing(both.worker.queue);
  expect_nothing(both.gateway.queue);
  CHECK_EQ(stats_of(both.worker).offline_out + stats_of(both.gateway).offline_out, announced);
  presence_session_close(session);
  expect(both.gateway.queue, PRESENCE_EVENT_OFFLINE);
  close_pair(both);
  a_whole_stream("later");
}

#define WAITERS 40

/* Waits on the queue until it is freed. */
static void *wait_until_freed(void *queue) {
  presence_event event;
  while (presence_queue_wait((presence_queue *)queue, &event, 1, -1) >= 0) continue;
  return NULL;
}

/* Uses the locks that all threads of a process share: those of the registry and the handle tables. */
static void *mark_and_wait(void *waiting) {
  presence_event event;
  presence_queue *own;
  OK(presence_queue_new(&own));
  OK(presence_watch(own, 0));
  for (int i = 0; i < 200; i++) {
    OK(mark_client_online("contended"));
    presence_queue_wake((presence_queue *)waiting);
    CHECK(presence_queue_wait(own, &event, 1, 1) >= 0);
    OK(mark_client_offline("contended"));
  }
  presence_queue_free(own);
  return NULL;
}

/* One queue for each waiting thread, and as many threads that contend with them for locks. */
static void contend(bool forks) {
  pthread_t waiters[WAITERS], markers[WAITERS];
  presence_queue *queues[WAITERS];
  for (int i = 0; i < WAITERS; i++) {
    OK(presence_queue_new(&queues[i]));
    CHECK_EQ(pthread_create(&waiters[i], NULL, wait_until_freed, queues[i]), 0);
  }
  for (int i = 0; i < WAITERS; i++) CHECK_EQ(pthread_create(&markers[i], NULL, mark_and_wait, queues[i]), 0);
  for (int i = 0; forks && i < 4; i++) {
    pid_t child = fork();
    if (child == 0) {
      begin_child("fork_while_threads_wait, child");
      contend(false);
      exit(0);
    }
    expect_child(child);
  }
  for (int i = 0; i < WAITERS; i++) CHECK_EQ(pthread_join(markers[i], NULL), 0);
  for (int i = 0; i < WAITERS; i++) {
    presence_queue_free(queues[i]);
    CHECK_EQ(pthread_join(waiters[i], NULL), 0);
  }
}

/* A child inherits no state of threads that wait in its parent: it can wait with twice as many of its own. */
static void role_fork_while_threads_wait(void) {
  peer parent = open_peer();
  contend(true);
  close_peer(parent);
}

/* The number of connections to the server, of any process. */
static int count_connections(void) {
  unsigned port, to, state;
  CHECK_EQ(sscanf(strrchr(url, ':'), ":%u", &port), 1);
  FILE *table = fopen("/proc/net/tcp", "r");
  CHECK(table);
  int count = 0;
  for (char line[256]; fgets(line, sizeof line, table);) {
    count += sscanf(line, "%*d: %*x:%*x %*x:%x %x", &to, &state) == 2 && to == port && state == 1; /* ESTABLISHED */
  }
  fclose(table);
  return count;
}

/* A child that inherited the sockets does not keep closed connections open. */
static void role_close_reaches_the_server_despite_a_child(void) {
  int before = count_connections(), ends[2];
  pair both = open_pair("c");
  CHECK_EQ(count_connections(), before + 2);
  CHECK_EQ(pipe(ends), 0);
  pid_t child = fork();
  if (child == 0) {
    begin_child("close_with_a_child, child");
    close(ends[1]);
    char byte;
    exit(read(ends[0], &byte, 1) == 0 ? 0 : 1); /* until its parent has finished */
  }
  close_pair(both);
  for (int64_t deadline = now_ms() + TIMEOUT_MS; count_connections() > before; usleep(1000)) CHECK(now_ms() < deadline);
  close(ends[1]);
  expect_child(child);
}

/* Exit -------------------------------------------------------------------------------------------------------------- */

static pair left; /* running when the process ends */

static void *send_for_ever(void *sender) {
  while (presence_sender_send_wait((presence_sender *)sender, "x", 1, -1) == PRESENCE_OK);
  return NULL;
}

static void *wait_for_ever(void *queue) {
  presence_event event;
  while (presence_queue_wait((presence_queue *)queue, &event, 1, -1) >= 0) continue;
  return NULL;
}

/* Starts streams, and threads that send and wait. */
static void leave_in_the_middle(void) {
  left = open_pair("c");
  start_thread(send_for_ever, left.sender);
  expect(left.gateway.queue, PRESENCE_EVENT_DATA);
  start_thread(wait_for_ever, left.gateway.queue);
  start_thread(wait_for_ever, left.worker.queue);
}

static void role_return_from_main(void) { leave_in_the_middle(); }

static void role_exit(void) {
  leave_in_the_middle();
  exit(3);
}

static void *exit_in_thread(void *unused) {
  (void)unused;
  exit(4);
}

static void role_exit_in_a_thread(void) {
  leave_in_the_middle();
  start_thread(exit_in_thread, NULL);
  for (;;) pause();
}

/* A host that cleans up in an atexit handler. */
static void close_at_exit(void) {
  running = "in an atexit handler";
  OK(mark_client_online("late"));
  OK(send_text(left.sender, "late"));
  expect_data(left.gateway.queue, "late");
  OK(mark_client_offline("late"));
  close_pair(left);
  CHECK_EQ(presence_online_count(), 0);
  exit(5); /* exit in a handler sets the status anew */
}

static void role_tidy_at_exit(void) {
  atexit(close_at_exit);
  left = open_pair("c");
  exit(0);
}

/* The first call and the first connection happen while the process ends. */
static void begin_at_exit(void) {
  running = "in an atexit handler";
  a_whole_stream("c");
  _exit(6);
}

static void role_begin_at_exit(void) { atexit(begin_at_exit); }

/* Signals ----------------------------------------------------------------------------------------------------------- */

static volatile sig_atomic_t handled;
static pthread_t handler_ran_on;

static void handle(int number) {
  handled = number;
  handler_ran_on = pthread_self();
}

/* Counts the library's threads, and finds the signals that all of them block. */
static int own_threads(unsigned long long *blocked) {
  int count = 0;
  DIR *tasks = opendir("/proc/self/task");
  CHECK(tasks);
  *blocked = ~0ULL;
  for (struct dirent *task; (task = readdir(tasks));) {
    char path[300], line[200];
    bool is_own = false;
    if (*task->d_name == '.') continue;
    snprintf(path, sizeof path, "/proc/self/task/%s/status", task->d_name);
    FILE *status = fopen(path, "r");
    if (!status) continue; /* the thread has ended meanwhile */
    while (fgets(line, sizeof line, status)) {
      unsigned long long mask;
      if (strcmp(line, "Name:\tpresence\n") == 0) is_own = true;
      if (is_own && sscanf(line, "SigBlk: %llx", &mask) == 1) *blocked &= mask;
    }
    fclose(status);
    count += is_own;
  }
  closedir(tasks);
  return count;
}

static bool is_in(unsigned long long mask, int number) { return mask >> (number - 1) & 1; }

static void role_host_signals_are_untouched(void) {
  struct sigaction before[65], after, own;
  sigset_t mask, mask_after;
  memset(&own, 0, sizeof own);
  own.sa_handler = handle;
  CHECK_EQ(sigaction(SIGUSR1, &own, NULL), 0);
  sigemptyset(&mask);
  sigaddset(&mask, SIGUSR2);
  sigaddset(&mask, SIGWINCH);
  CHECK_EQ(pthread_sigmask(SIG_SETMASK, &mask, NULL), 0);
  for (int number = 1; number <= 64; number++) {
    if (number != 32 && number != 33) CHECK_EQ(sigaction(number, NULL, &before[number]), 0); /* the C library's */
  }

  pair both = open_pair("c");
  /* The runtime resolves names on further threads. */
  char by_name[100];
  const char *port = strrchr(url, ':');
  CHECK(port);
  snprintf(by_name, sizeof by_name, "nats://localhost%s", port);
  presence_conn *named;
  OK(presence_connect(by_name, NULL, &named, NULL));

  CHECK_EQ(pthread_sigmask(SIG_SETMASK, NULL, &mask_after), 0);
  for (int number = 1; number <= 64; number++) {
    if (number == 32 || number == 33) continue;
    CHECK_EQ(sigismember(&mask_after, number), sigismember(&mask, number));
    CHECK_EQ(sigaction(number, NULL, &after), 0);
    CHECK(after.sa_handler == before[number].sa_handler && after.sa_flags == before[number].sa_flags);
  }
  unsigned long long blocked;
  CHECK(own_threads(&blocked) >= 1);
  int must[] = {SIGHUP, SIGINT, SIGQUIT, SIGPIPE, SIGALRM, SIGTERM, SIGUSR1, SIGUSR2, SIGCHLD, SIGPROF, SIGIO, SIGURG};
  for (size_t i = 0; i < sizeof must / sizeof *must; i++) CHECK(is_in(blocked, must[i]));
  CHECK(!is_in(blocked, SIGSEGV) && !is_in(blocked, SIGBUS) && !is_in(blocked, SIGABRT));

  /* Only this thread handles the signal, whatever the others do. */
  for (int round = 0; round < 100; round++) {
    handled = 0;
    OK(send_text(both.sender, "x"));
    CHECK_EQ(kill(getpid(), SIGUSR1), 0);
    CHECK_EQ(handled, SIGUSR1); /* delivered before kill returns, as no other thread can handle it */
    CHECK(pthread_equal(handler_ran_on, pthread_self()));
    expect_data(both.gateway.queue, "x");
  }
  OK(presence_close(named, TIMEOUT_MS));
  close_pair(both);
}

/* A host's handler interrupts a wait; the wait continues. */
static void *interrupt_and_put(void *waiter) {
  for (int i = 0; i < 50; i++) {
    CHECK_EQ(pthread_kill(*(pthread_t *)waiter, SIGUSR1), 0);
    usleep(1000);
  }
  OK(mark_client_online("at last"));
  return NULL;
}

static void role_waits_resume_after_signals(void) {
  struct sigaction own;
  presence_queue *queue;
  pthread_t self = pthread_self();
  memset(&own, 0, sizeof own);
  own.sa_handler = handle; /* without SA_RESTART */
  CHECK_EQ(sigaction(SIGUSR1, &own, NULL), 0);
  OK(presence_queue_new(&queue));
  OK(presence_watch(queue, 0));
  pthread_t thread = start_thread(interrupt_and_put, &self);
  expect(queue, PRESENCE_EVENT_ONLINE);
  CHECK_EQ(handled, SIGUSR1);
  join_thread(thread);
  OK(mark_client_offline("at last"));
  presence_queue_free(queue);
}

/* The server dies while messages are being sent: the host, which does not handle SIGPIPE, survives. Ends the server. */
static void role_server_death_leaves_the_host_alive(void) {
  const char *server = getenv("NATS_SERVER_PID");
  struct sigaction now;
  CHECK(server);
  signal(SIGPIPE, SIG_DFL);
  pair both = open_pair(""); /* anonymous: only the loss of its own connection stops the sender */
  OK(presence_conn_watch(both.worker.conn, both.worker.queue, 7));
  for (int i = 0; i < 1000; i++) OK(presence_sender_send_wait(both.sender, "before", 6, TIMEOUT_MS));
  CHECK_EQ(kill(atoi(server), SIGKILL), 0);
  int32_t status;
  while ((status = presence_sender_send_wait(both.sender, "after", 5, TIMEOUT_MS)) == PRESENCE_OK) continue;
  CHECK_STATUS(status, PRESENCE_DISCONNECTED);

  bool stopped = false, disconnected = false;
  while (!stopped || !disconnected) {
    presence_event event;
    CHECK_EQ(presence_queue_wait(both.worker.queue, &event, 1, TIMEOUT_MS), 1);
    if (event.kind == PRESENCE_EVENT_STOPPED) {
      CHECK_STATUS(event.status, PRESENCE_DISCONNECTED);
      CHECK(event.sender == both.sender);
      stopped = true;
    } else if (event.kind == PRESENCE_EVENT_DISCONNECTED) {
      CHECK_EQ(event.tag, 7);
      disconnected = true;
    }
  }
  presence_event last;
  do CHECK_EQ(presence_queue_wait(both.gateway.queue, &last, 1, TIMEOUT_MS), 1);
  while (last.kind == PRESENCE_EVENT_DATA);
  CHECK_EQ(last.kind, PRESENCE_EVENT_ERROR);
  CHECK_STATUS(last.status, PRESENCE_DISCONNECTED);

  presence_stream *stream = NULL;
  CHECK_STATUS(start_request(both.gateway.conn, both.gateway.queue, "pair", NULL, 0, "c", 1, NULL, 0, &stream, NULL),
               PRESENCE_DISCONNECTED);
  CHECK(!stream && !is_client_online("c"));
  CHECK_EQ(sigaction(SIGPIPE, NULL, &now), 0);
  CHECK(now.sa_handler == SIG_DFL);
  CHECK_STATUS(presence_close(both.gateway.conn, TIMEOUT_MS), PRESENCE_DISCONNECTED);
  CHECK_STATUS(presence_close(both.worker.conn, TIMEOUT_MS), PRESENCE_DISCONNECTED);
  presence_sender_free(both.sender);
  presence_stream_free(both.stream);
  presence_service_free(both.service);
  presence_queue_free(both.gateway.queue);
  presence_queue_free(both.worker.queue);
}

/* A server that reads everything and breaks the connection again and again while the client writes: first by a FIN,
 * then by a RST for what still arrives. That makes a write raise SIGPIPE; a killed server mostly sends RST at once,
 * which makes the write fail only. */
enum { BREAKS = 200 };

static int breaks; /* atomic */

static void *break_connections(void *listener) {
  static const char info[] = "INFO {\"server_id\":\"x\",\"version\":\"2.10.0\",\"proto\":1,\"headers\":true,\"max_payload\":1048576}\r\n";
  static char taken[1 << 16];
  while (__atomic_load_n(&breaks, __ATOMIC_SEQ_CST) < BREAKS) {
    int fd = accept(*(int *)listener, NULL, NULL);
    CHECK(fd >= 0);
    CHECK(send(fd, info, sizeof info - 1, MSG_NOSIGNAL) == (ssize_t)sizeof info - 1);
    bool greeted = false;
    for (ssize_t count, total = 0; total < 300000 && (count = read(fd, taken, sizeof taken)) > 0; total += count) {
      if (!greeted && memmem(taken, (size_t)count, "PING\r\n", 6)) {
        greeted = true;
        CHECK_EQ(send(fd, "PONG\r\n", 6, MSG_NOSIGNAL), 6);
      }
    }
    shutdown(fd, SHUT_WR);
    close(fd);
    __atomic_add_fetch(&breaks, 1, __ATOMIC_SEQ_CST);
  }
  close(*(int *)listener);
  return NULL;
}

static void role_broken_connections_raise_no_sigpipe(void) {
  struct sockaddr_in address;
  socklen_t length = sizeof address;
  char to[40];
  signal(SIGPIPE, SIG_DFL);
  memset(&address, 0, sizeof address);
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  int listener = socket(AF_INET, SOCK_STREAM, 0);
  CHECK_EQ(bind(listener, (struct sockaddr *)&address, sizeof address), 0);
  CHECK_EQ(listen(listener, 8), 0);
  CHECK_EQ(getsockname(listener, (struct sockaddr *)&address, &length), 0);
  snprintf(to, sizeof to, "nats://127.0.0.1:%d", ntohs(address.sin_port));
  pthread_t thread = start_thread(break_connections, &listener);

  presence_conn *conn;
  presence_config *config = presence_config_new();
  OK(presence_config_set(config, "reconnect_min_ms", "1"));
  OK(presence_config_set(config, "reconnect_max_ms", "1"));
  OK(presence_connect(to, config, &conn, NULL));
  presence_config_free(config);
  char id[1001];
  memset(id, 'x', 1000);
  id[1000] = '\0';
  while (__atomic_load_n(&breaks, __ATOMIC_SEQ_CST) < BREAKS) {
    presence_stats stats;
    OK(presence_conn_stats(conn, &stats));
    if (stats.bytes_waiting < 1 << 22) OK(mark_client_offline(id)); /* announced on the connection */
    else sched_yield();
  }
  join_thread(thread);
  (void)presence_close(conn, 0);
}

/* What the runtime's threads inherit ---------------------------------------------------------------------------------- */

/* With an environment that asks for small stacks; resolving a name needs more. */
static void role_small_default_stacks_are_enough(void) {
  CHECK(getenv("RUST_MIN_STACK"));
  char by_name[64];
  snprintf(by_name, sizeof by_name, "nats://localhost:%s", strrchr(url, ':') + 1);
  url = by_name;
  a_whole_stream("own");
}

/* Counts the library's threads, all of which must be allowed this many CPUs and have this policy. */
static int count_threads(int cpus, int policy) {
  int count = 0;
  DIR *tasks = opendir("/proc/self/task");
  CHECK(tasks);
  for (struct dirent *task; (task = readdir(tasks));) {
    char path[300], name[20] = "";
    snprintf(path, sizeof path, "/proc/self/task/%s/comm", task->d_name);
    FILE *comm = fopen(path, "r");
    if (!comm) continue;
    bool is_ours = fgets(name, sizeof name, comm) && strncmp(name, "presence", 8) == 0;
    fclose(comm);
    if (!is_ours) continue;
    cpu_set_t allowed;
    CHECK_EQ(sched_getaffinity(atoi(task->d_name), sizeof allowed, &allowed), 0);
    CHECK_EQ(CPU_COUNT(&allowed), cpus);
    CHECK_EQ(sched_getscheduler(atoi(task->d_name)), policy);
    count++;
  }
  closedir(tasks);
  return count;
}

/* The connecting thread is pinned to a CPU and, where allowed, has a real-time priority. It keeps both; the
 * library's threads have neither. */
static void role_runtime_threads_inherit_no_affinity_or_priority(void) {
  cpu_set_t all, one;
  CHECK_EQ(sched_getaffinity(0, sizeof all, &all), 0);
  CPU_ZERO(&one);
  for (int cpu = 0; cpu < CPU_SETSIZE && CPU_COUNT(&one) == 0; cpu++)
    if (CPU_ISSET(cpu, &all)) CPU_SET(cpu, &one);
  CHECK_EQ(sched_setaffinity(0, sizeof one, &one), 0);
  struct sched_param priority;
  memset(&priority, 0, sizeof priority);
  priority.sched_priority = 10;
  int policy = sched_setscheduler(0, SCHED_FIFO, &priority) == 0 ? SCHED_FIFO : SCHED_OTHER;
  a_whole_stream("own");
  CHECK(count_threads(CPU_COUNT(&all), SCHED_OTHER) > 0);
  cpu_set_t still;
  CHECK_EQ(sched_getaffinity(0, sizeof still, &still), 0);
  CHECK(CPU_EQUAL(&still, &one));
  CHECK_EQ(sched_getscheduler(0), policy);
}

static void fork_before_any_call(void) { expect_exit(start("role_fork_before_any_call"), 0); }
static void fork_after_marks_and_sessions(void) { expect_exit(start("role_fork_after_marks_and_sessions"), 0); }
static void fork_while_connected(void) { expect_exit(start("role_fork_while_connected"), 0); }
static void fork_while_threads_wait(void) { expect_exit(start("role_fork_while_threads_wait"), 0); }

static void close_reaches_the_server_despite_a_child(void) { expect_exit(start("role_close_reaches_the_server_despite_a_child"), 0); }

static void exit_with_running_streams_keeps_the_status(void) {
  for (int round = 0; round < 5; round++) { /* where the threads are at that moment is left to chance */
    expect_exit(start("role_return_from_main"), 0);
    expect_exit(start("role_exit"), 3);
    expect_exit(start("role_exit_in_a_thread"), 4);
  }
}

static void calls_in_atexit_handlers_work(void) {
  expect_exit(start("role_tidy_at_exit"), 5);
  expect_exit(start("role_begin_at_exit"), 6);
}

static void host_signals_are_untouched(void) { expect_exit(start("role_host_signals_are_untouched"), 0); }
static void waits_resume_after_signals(void) { expect_exit(start("role_waits_resume_after_signals"), 0); }
static void broken_connections_raise_no_sigpipe(void) { expect_exit(start("role_broken_connections_raise_no_sigpipe"), 0); }
static void runtime_threads_inherit_no_affinity_or_priority(void) { expect_exit(start("role_runtime_threads_inherit_no_affinity_or_priority"), 0); }
static void small_default_stacks_are_enough(void) {
  CHECK_EQ(setenv("RUST_MIN_STACK", "16384", 1), 0);
  expect_exit(start("role_small_default_stacks_are_enough"), 0);
  CHECK_EQ(unsetenv("RUST_MIN_STACK"), 0);
}
static void server_death_leaves_the_host_alive(void) { expect_exit(start("role_server_death_leaves_the_host_alive"), 0); }

int main(int argc, char **argv) {
  begin(argc, argv);
  ROLE(role_fork_before_any_call);
  ROLE(role_fork_after_marks_and_sessions);
  ROLE(role_fork_while_connected);
  ROLE(role_fork_while_threads_wait);
  ROLE(role_close_reaches_the_server_despite_a_child);
  ROLE(role_return_from_main);
  ROLE(role_exit);
  ROLE(role_exit_in_a_thread);
  ROLE(role_tidy_at_exit);
  ROLE(role_begin_at_exit);
  ROLE(role_host_signals_are_untouched);
  ROLE(role_waits_resume_after_signals);
  ROLE(role_broken_connections_raise_no_sigpipe);
  ROLE(role_server_death_leaves_the_host_alive);
  ROLE(role_small_default_stacks_are_enough);
  ROLE(role_runtime_threads_inherit_no_affinity_or_priority);
  RUN(fork_before_any_call);
  RUN(fork_after_marks_and_sessions);
  RUN(fork_while_connected);
  RUN(fork_while_threads_wait);
  RUN(close_reaches_the_server_despite_a_child);
  RUN(exit_with_running_streams_keeps_the_status);
  RUN(calls_in_atexit_handlers_work);
  RUN(host_signals_are_untouched);
  RUN(waits_resume_after_signals);
  RUN(broken_connections_raise_no_sigpipe);
  RUN(small_default_stacks_are_enough);
  RUN(runtime_threads_inherit_no_affinity_or_priority);
  RUN_ON_LEVEL_0(server_death_leaves_the_host_alive); /* last: it ends the server */
  return 0;
}
