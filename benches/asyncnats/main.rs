//! What a publish costs in async-nats alone, which the library uses, and how long its way to the socket is.
//!
//! The runtime and the options are the library's: one thread, 2048 commands, subjects that are not checked.
//!
//! asyncnats publish URL MESSAGES SIZE SUBJECT
//! asyncnats paced URL MESSAGES PAUSE_US SUBJECT

use bytes::Bytes;
use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::{TimeSpec, TimeValLike};
use nix::time::{ClockId, ClockNanosleepFlags, clock_gettime, clock_nanosleep};

type Failure = Box<dyn std::error::Error + Send + Sync>;

fn main() -> Result<(), Failure> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [what, url, messages, number, subject] = arguments.as_slice() else {
        return Err("the arguments are WHAT URL MESSAGES NUMBER SUBJECT: see benches/run".into());
    };
    let (messages, number) = (messages.parse::<u32>()?, number.parse::<u32>()?);
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    let (url, subject) = (url.clone(), async_nats::Subject::from(subject.as_str()));
    if what == "paced" {
        // From another thread, as a host's send.
        return runtime.block_on(paced(url, messages, TimeSpec::microseconds(number.into()), subject));
    }
    // On the runtime's thread: from another one a publish costs more.
    runtime.block_on(runtime.spawn(publish(url, messages, number as usize, subject)))?
}

fn options() -> async_nats::ConnectOptions {
    async_nats::ConnectOptions::new().client_capacity(2048).skip_subject_validation(true)
}

/// Publishes a message after each pause, and prints the times.
async fn paced(url: String, messages: u32, pause: TimeSpec, subject: async_nats::Subject) -> Result<(), Failure> {
    let client = options().connect(url).await?;
    client.flush().await?;
    let mut times = Vec::new();
    let mut next = now()? + TimeSpec::milliseconds(100);
    for number in 0..messages {
        clock_nanosleep(ClockId::CLOCK_MONOTONIC, ClockNanosleepFlags::TIMER_ABSTIME, &next)?;
        times.push(now()?.num_nanoseconds().to_string());
        client.publish(subject.clone(), format!("client-{number:06}").into()).await?;
        next = next + pause;
    }
    client.flush().await?;
    println!("{{\"times_ns\": [{}]}}", times.join(", "));
    Ok(())
}

fn now() -> nix::Result<TimeSpec> {
    clock_gettime(ClockId::CLOCK_MONOTONIC)
}

/// Measures the CPU time of the process per message, until nats-server has everything.
async fn publish(url: String, messages: u32, size: usize, subject: async_nats::Subject) -> Result<(), Failure> {
    let client = options().connect(url).await?;
    client.flush().await?;
    let message = Bytes::from(vec![0; size]);

    let before = cpu_ns()?;
    for _ in 0..messages {
        client.publish(subject.clone(), message.clone()).await?;
    }
    client.flush().await?;
    // A flush only writes. nats-server handles messages in order, so when it answers that this request has no responders
    // it has all messages before it.
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
