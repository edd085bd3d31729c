/*
 * A shell over the C ABI, for tests that drive the other end of the wire by hand. It reads one command a line and
 * prints one JSON object per event, among them {"event": "reply", "status": ...} for each command. Bytes appear as the
 * characters with their numbers. It exits at the end of its input.
 *
 *   connect URL [KEY=VALUE]...      serve SUBJECT GROUP|- MAX       listen        stats         close DRAIN_MS
 *   send N DATA                     flood N COUNT  (0, 1, ...)      end N         error N TEXT  free N
 *   code N CODE TEXT  (an error)    header N NAME                   option KEY VALUE  (for later requests)
 *   request TAG SUBJECT CLIENT|- DATA                               cancel TAG    drop TAG
 *   consumed TAG BYTES              fill N SIZE  (until the sender is full: "text" is the number of accepted messages)
 *   online ID                       offline ID                      is_online ID  watch
 *   session ID  (one at a time)     leave  (closes it)              now  ("text" is the wall clock's time)
 *
 * N counts the requests that arrived, from 1; TAG is 1 to 999.
 */
#include <nats_presence.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { MAX = 1000 };

static presence_conn *conn;
static presence_queue *queue;
static presence_config *options;
static presence_sender *senders[MAX];
static presence_stream *streams[MAX];
static presence_session *session;
static int requests;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;  /* of senders and requests */

static const char *const statuses[] = {
    "OK",        "INVALID",       "OFFLINE", "CLOSED",    "CANCELLED", "FULL",   "TOO_LARGE", "RESERVED", "DISCONNECTED",
    "PEER_GONE", "NO_RESPONDERS", "BUSY",    "TIMEOUT",   "REMOTE",    "FORKED", "INTERNAL",
};

static const char *const kinds[] = {
    "",         "REQUEST", "DATA",   "END",     "ERROR",     "STOPPED",
    "WRITABLE", "ONLINE",  "OFFLINE", "CONNECTED", "DISCONNECTED", "LOG",
};

static const char *status_name(int32_t status) {
  return status <= 0 && status > -16 ? statuses[-status] : "?";
}

static void print_text(const char *name, const void *data, size_t length) {
  printf(", \"%s\": \"", name);
  for (const unsigned char *c = data, *end = c + length; c < end; c++) {
    if (*c < 0x20 || *c >= 0x7f || *c == '"' || *c == '\\') printf("\\u%04x", *c);
    else putchar(*c);
  }
  putchar('"');
}

static void reply(int32_t status, const char *text) {
  flockfile(stdout);
  printf("{\"event\": \"reply\", \"status\": \"%s\"", status_name(status));
  if (text) print_text("text", text, strlen(text));
  puts("}");
  funlockfile(stdout);
}

/* The number of a sender, from 1; a request gets a new one. */
static int number_of(presence_sender *sender, bool is_new) {
  int number = 0;
  pthread_mutex_lock(&lock);
  if (is_new) senders[number = ++requests % MAX] = sender;
  else for (int i = 0; i < MAX; i++) if (senders[i] == sender) number = i;
  pthread_mutex_unlock(&lock);
  return number;
}

static void *print_events(void *unused) {
  (void)unused;
  presence_event event;
  while (presence_queue_wait(queue, &event, 1, -1) >= 0) {
    if (event.kind <= 0 || event.kind > PRESENCE_EVENT_LOG) continue;
    flockfile(stdout);
    printf("{\"event\": \"%s\", \"status\": \"%s\"", kinds[event.kind], status_name(event.status));
    if (event.sender) printf(", \"n\": %d", number_of(event.sender, event.kind == PRESENCE_EVENT_REQUEST));
    if (event.stream) printf(", \"tag\": %d", (int)event.tag);
    if (event.error_code) printf(", \"code\": %d", (int)event.error_code);
    if (event.client) print_text("client", event.client, event.client_len);
    if (event.subject) print_text("subject", event.subject, event.subject_len);
    print_text("data", event.data, event.data_len);
    puts("}");
    funlockfile(stdout);
  }
  return NULL;
}

/* Cuts the next word off the line. */
static char *word(char **line) {
  char *found = strsep(line, " ");
  return found ? found : "";
}

static char *rest(char **line) { return *line ? *line : ""; }

static int number(char **line) { return atoi(word(line)) % MAX; }

static const char *unless_dash(const char *text) { return strcmp(text, "-") ? text : ""; }

static void do_connect(char *line) {
  const char *url = word(&line);
  presence_config *config = presence_config_new();
  presence_error error = {0};
  int32_t status = PRESENCE_OK;
  while (line && status == PRESENCE_OK) {
    char *value = word(&line), *key = strsep(&value, "=");
    status = presence_config_set(config, key, value);
  }
  if (status == PRESENCE_OK) status = presence_connect(url, config, &conn, &error);
  if (status == PRESENCE_OK) status = presence_conn_watch(conn, queue, 0);
  presence_config_free(config);
  reply(status, error.message);
}

static void do_serve(char *line) {
  presence_error error = {0};
  presence_service *service;
  const char *subject = word(&line), *group = unless_dash(word(&line));
  int32_t status = presence_serve(conn, queue, subject, group, (uint32_t)number(&line), 0, &service, &error);
  reply(status, error.message);
}

static void do_request(char *line) {
  presence_error error = {0};
  int tag = number(&line);
  const char *subject = word(&line), *client = unless_dash(word(&line)), *data = rest(&line);
  const presence_request_args args = {.size = sizeof args,
                                      .subject = subject,
                                      .data = data,
                                      .data_len = strlen(data),
                                      .client = client,
                                      .client_len = strlen(client),
                                      .tag = (uint64_t)tag,
                                      .config = options};
  int32_t status = presence_request(conn, queue, &args, &streams[tag], &error);
  reply(status, error.message);
}

/* Sends 0, 1, ... up to the first that fails. */
static void do_flood(char *line) {
  presence_sender *sender = senders[number(&line)];
  int32_t status = PRESENCE_OK;
  for (int i = 0, count = atoi(word(&line)); i < count && status == PRESENCE_OK; i++) {
    char text[16];
    int length = snprintf(text, sizeof text, "%d", i);
    status = presence_sender_send_wait(sender, text, (size_t)length, -1);
  }
  reply(status, NULL);
}

/* Sends messages of this size up to the first that is refused. */
static void do_fill(char *line) {
  presence_sender *sender = senders[number(&line)];
  size_t size = (size_t)atoi(word(&line));
  char *data = calloc(1, size + 1), text[16];
  int32_t status, count = 0;
  while ((status = presence_sender_send(sender, data, size)) == PRESENCE_OK) count++;
  snprintf(text, sizeof text, "%d", count);
  reply(status, text);
  free(data);
}

static void do_header(char *line) {
  presence_sender *sender = senders[number(&line)];
  const char *value;
  size_t length;
  int32_t status = presence_sender_header(sender, word(&line), &value, &length);
  char text[2048];
  snprintf(text, sizeof text, "%.*s", (int)length, value ? value : "");
  reply(status, value ? text : NULL);
}

static void do_now(void) {
  struct timespec now;
  char text[32];
  clock_gettime(CLOCK_REALTIME, &now);
  snprintf(text, sizeof text, "%lld", (long long)now.tv_sec);
  reply(PRESENCE_OK, text);
}

static void do_stats(void) {
  presence_stats s;
  int32_t status = presence_conn_stats(conn, &s);
  flockfile(stdout);
  printf("{\"event\": \"reply\", \"status\": \"%s\"", status_name(status));
#define PRINT(field) printf(", \"" #field "\": %llu", (unsigned long long)s.field)
  PRINT(connects), PRINT(streams), PRINT(senders), PRINT(requests), PRINT(requests_busy), PRINT(requests_ignored);
  PRINT(messages_in), PRINT(messages_ignored), PRINT(offline_out), PRINT(offline_in), PRINT(bytes_waiting), PRINT(lanes);
  puts("}");
  funlockfile(stdout);
}

static void execute(char *line) {
  const char *command = word(&line);
#define IS(name) (strcmp(command, name) == 0)
  if (IS("connect")) do_connect(line);
  else if (IS("serve")) do_serve(line);
  else if (IS("request")) do_request(line);
  else if (IS("flood")) do_flood(line);
  else if (IS("fill")) do_fill(line);
  else if (IS("header")) do_header(line);
  else if (IS("stats")) do_stats();
  else if (IS("listen")) reply(presence_listen_offline(conn), NULL);
  else if (IS("watch")) reply(presence_watch(queue, 0), NULL);
  else if (IS("close")) reply(presence_close(conn, number(&line)), NULL);
  else if (IS("online")) reply(mark_client_online(rest(&line)), NULL);
  else if (IS("offline")) reply(mark_client_offline(rest(&line)), NULL);
  else if (IS("is_online")) reply(PRESENCE_OK, is_client_online(rest(&line)) ? "yes" : "no");
  else if (IS("session")) reply(presence_session_open(rest(&line), strlen(rest(&line)), &session), NULL);
  else if (IS("leave")) presence_session_close(session), reply(PRESENCE_OK, NULL);
  else if (IS("now")) do_now();
  else if (IS("cancel")) reply(presence_stream_cancel(streams[number(&line)]), NULL);
  else if (IS("drop")) presence_stream_free(streams[number(&line)]), reply(PRESENCE_OK, NULL);
  else if (IS("consumed")) {
    presence_stream *stream = streams[number(&line)];
    reply(presence_stream_consumed(stream, strtoull(word(&line), NULL, 10)), NULL);
  } else if (IS("option")) {
    const char *key = word(&line);
    reply(presence_config_set(options, key, rest(&line)), NULL);
  } else {
    int n = number(&line);
    if (IS("send")) reply(presence_sender_send(senders[n], rest(&line), strlen(rest(&line))), NULL);
    else if (IS("end")) reply(presence_sender_end(senders[n]), NULL);
    else if (IS("error")) reply(presence_sender_error(senders[n], rest(&line), strlen(rest(&line))), NULL);
    else if (IS("code")) {
      int32_t code = (int32_t)atoi(word(&line));
      reply(presence_sender_error_code(senders[n], code, rest(&line), strlen(rest(&line))), NULL);
    } else if (IS("free")) presence_sender_free(senders[n]), senders[n] = NULL, reply(PRESENCE_OK, NULL);
    else reply(PRESENCE_INVALID, "no such command");
  }
}

int main(void) {
  pthread_t printer;
  char *line = NULL;
  size_t capacity = 0;
  ssize_t length;
  setvbuf(stdout, NULL, _IOLBF, 0);
  if (presence_queue_new(&queue)) return 1;
  options = presence_config_new();
  pthread_create(&printer, NULL, print_events, NULL);
  while ((length = getline(&line, &capacity, stdin)) > 0) {
    line[length - 1] = '\0';
    execute(line);
  }
  presence_close(conn, 100);
  presence_queue_free(queue);
  pthread_join(printer, NULL);
  for (int i = 0; i < MAX; i++) presence_sender_free(senders[i]), presence_stream_free(streams[i]);
  presence_config_free(options);
  free(line);
}
