//! `Client::send_unsub` writes UNSUB into the subject of a PUB. nats-server takes it for UNSUB, and reports no error.

use super::Server;
use crate::Config;
use crate::nats::client::{Client, OnServerError};
use crate::nats::dial::parse_servers;
use bytes::Bytes;
use std::sync::Arc;
use std::task::{Poll, Waker};
use std::time::Duration;
use tokio::runtime::Builder;
use tokio::time::timeout;

const TIMEOUT: Duration = Duration::from_secs(20);

#[test]
#[ignore = "starts a nats-server"]
fn unsub_in_a_subject_works_at_nats_server() {
    let (sender, errors) = std::sync::mpsc::channel();
    let on_server_error: OnServerError = Arc::new(move |text| sender.send(text).unwrap());
    let server = Server::start();
    let address = parse_servers(&server.1).unwrap().remove(0);
    let config = Config::new();
    let options = config.for_connect().unwrap();
    Builder::new_multi_thread().enable_all().build().unwrap().block_on(async {
        let client = Client::connect(options, address, "test", None, on_server_error).await.unwrap();
        let [mut ended, mut echo] = ["ended", "echo"].map(|subject| {
            let subscribed = client.try_subscribe(subject.into(), "");
            subscribed.unwrap().unwrap()
        });
        client.publish("ended".into(), "before".into()).await.unwrap();
        client.send_unsub(ended.sid, "unserved").await.unwrap();
        client.publish("ended".into(), "after".into()).await.unwrap();
        client.publish("echo".into(), Bytes::new()).await.unwrap();
        let next = std::future::poll_fn(|context| echo.poll_next(context.waker()));
        assert!(timeout(TIMEOUT, next).await.unwrap().is_some());
        let Poll::Ready(Some(message)) = ended.poll_next(Waker::noop()) else { panic!("lost what came before UNSUB") };
        assert_eq!(message.payload, "before");
        assert!(ended.poll_next(Waker::noop()).is_pending(), "nats-server ignores the UNSUB");
    });
    assert!(errors.try_recv().is_err());
}
