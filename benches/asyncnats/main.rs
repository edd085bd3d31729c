//! What a publish costs in async-nats alone, which the library uses on level 0: the floor of a send's CPU time there.
//!
//! The runtime and the options are the library's: one thread, 2048 commands, subjects that are not checked.
//!
//! asyncnats URL MESSAGES SIZE SUBJECT

use bytes::Bytes;
use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::TimeValLike;

type Failure = Box<dyn std::error::Error + Send + Sync>;

fn main() -> Result<(), Failure> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [url, messages, size, subject] = arguments.as_slice() else {
        return Err("the arguments are URL MESSAGES SIZE SUBJECT: see benches/run".into());
    };
    let (messages, size) = (messages.parse::<u32>()?, size.parse::<usize>()?);
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    let publishing = publish(url.clone(), messages, size, subject.as_str().into());
    // On the runtime's thread, as in the library: from another thread a publish costs more.
    runtime.block_on(runtime.spawn(publishing))?
}

/// Measures the CPU time of the process per message, until nats-server has everything.
async fn publish(url: String, messages: u32, size: usize, subject: async_nats::Subject) -> Result<(), Failure> {
    let options = async_nats::ConnectOptions::new().client_capacity(2048).skip_subject_validation(true);
    let client = options.connect(url).await?;
    client.flush().await?;
    let message = Bytes::from(vec![0; size]);

    let before = cpu_ns()?;
    for _ in 0..messages {
        client.publish(subject.clone(), message.clone()).await?;
    }
    client.flush().await?;
    // A flush only writes. nats-server answers a request to nobody when it has everything before it.
    match client.request("bench.nobody", Bytes::new()).await {
        Err(error) if error.kind() == async_nats::RequestErrorKind::NoResponders => {}
        answer => return Err(format!("nats-server did not answer as expected: {answer:?}").into()),
    }
    println!("{{\"cpu_ns_per_send\": {:.1}}}", (cpu_ns()? - before) as f64 / f64::from(messages));
    Ok(())
}

/// Returns the CPU time of this process, of all threads, user and system.
fn cpu_ns() -> nix::Result<i64> {
    let usage = getrusage(UsageWho::RUSAGE_SELF)?;
    Ok((usage.user_time() + usage.system_time()).num_nanoseconds())
}
