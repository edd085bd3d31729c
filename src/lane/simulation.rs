//! Lanes in a simulated network: any faults, in any order, from a seed. `docs/assurance.md` lists the promises.
//!
//! `PRESENCE_SIMULATIONS=1000000` sets the number of schedules; `PRESENCE_SEED=17` runs one schedule and prints its
//! trace.

mod hostile;
mod schedule;
mod world;

use crate::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use schedule::{Schedule, Setup, Step, Weather};
use std::any::Any;
use std::env;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::thread;
use world::{Failure, Seen, run};

/// Runs a schedule; a panic is a failure, too.
fn outcome(schedule: &Schedule) -> Result<Seen, Failure> {
    let text = |panic: Box<dyn Any + Send>| match panic.downcast::<String>() {
        Ok(text) => *text,
        Err(panic) => panic.downcast_ref::<&str>().copied().unwrap_or_default().into(),
    };
    catch_unwind(AssertUnwindSafe(|| run(schedule, false).0))
        .unwrap_or_else(|panic| Err(Failure { promise: "nothing panics", text: text(panic) }))
}

/// Removes and simplifies steps as long as the schedule still fails in the same way.
fn shrink(mut schedule: Schedule, failure: &Failure) -> Schedule {
    let fails = |schedule: &Schedule| outcome(schedule).is_err_and(|other| other.promise == failure.promise);
    loop {
        let before = schedule.to_string();
        let mut size = schedule.steps.len();
        while size > 0 {
            let mut at = 0;
            while at < schedule.steps.len() {
                let mut less = schedule.clone();
                less.steps.drain(at..(at + size).min(less.steps.len()));
                if fails(&less) {
                    schedule = less;
                } else {
                    at += size;
                }
            }
            size /= 2;
        }
        for at in 0..schedule.steps.len() {
            for simpler in simpler_steps(schedule.steps[at]) {
                let mut less = schedule.clone();
                less.steps[at] = simpler;
                if fails(&less) {
                    schedule = less;
                    break;
                }
            }
        }
        for setup in simpler_setups(schedule.setup) {
            let less = Schedule { setup, ..schedule.clone() };
            if fails(&less) {
                schedule = less;
            }
        }
        if schedule.to_string() == before {
            return schedule;
        }
    }
}

fn simpler_steps(step: Step) -> Vec<Step> {
    match step {
        Step::Wait(time) if time > 0 => vec![Step::Wait(0), Step::Wait(time / 2), Step::Wait(time / 1000 * 1000)],
        Step::Send { stream, count } if count > 1 => {
            vec![Step::Send { stream, count: 1 }, Step::Send { stream, count: count / 2 }]
        }
        Step::Weather(weather) => vec![
            Step::Weather(Weather { drop: 0, ..weather }),
            Step::Weather(Weather { double: 0, ..weather }),
            Step::Weather(Weather { reorder: false, ..weather }),
            Step::Weather(Weather { rate: 0, ..weather }),
            Step::Weather(Weather { delay: 1000, ..weather }),
        ],
        _ => vec![],
    }
    .into_iter()
    .filter(|simpler| format!("{simpler:?}") != format!("{step:?}"))
    .collect()
}

fn simpler_setups(setup: Setup) -> Vec<Setup> {
    vec![
        Setup { lag: 0, ..setup },
        Setup { waits: false, ..setup },
        Setup { many: false, ..setup },
        Setup { blocked: false, ..setup },
        Setup { is_one_server: true, ..setup },
        Setup { limit: 4 << 20, ..setup },
        Setup { max_payload: 1 << 20, ..setup },
    ]
}

fn number_of(name: &str) -> Option<u64> {
    env::var(name).ok().map(|value| value.parse().unwrap_or_else(|_| panic!("{name}={value} is not a number")))
}

/// Describes a seed that fails: the promise, the shrunk schedule and its trace.
fn report(seed: u64, failure: &Failure) -> String {
    let schedule = shrink(Schedule::of(seed), failure);
    let trace = catch_unwind(AssertUnwindSafe(|| run(&schedule, true).1)).unwrap_or_default().join("\n");
    format!("PRESENCE_SEED={seed} breaks {:?}: {}\nshrunk to\n{schedule}\n{trace}", failure.promise, failure.text)
}

#[test]
fn lanes_keep_their_promises() {
    if let Some(seed) = number_of("PRESENCE_SEED") {
        let schedule = Schedule::of(seed);
        println!("{schedule}\n{}", run(&schedule, true).1.join("\n"));
        if let Err(failure) = outcome(&schedule) {
            panic!("{}", report(seed, &failure));
        }
        return;
    }
    let count = number_of("PRESENCE_SIMULATIONS").unwrap_or(100_000);
    let (next, is_over) = (AtomicU64::new(1), AtomicBool::new(false));
    let simulate = || {
        let mut seen = Seen::default();
        while !is_over.load(Ordering::Relaxed) {
            let seed = next.fetch_add(1, Ordering::Relaxed);
            if seed > count {
                break;
            }
            match outcome(&Schedule::of(seed)) {
                Ok(more) => seen += more,
                Err(failure) => {
                    is_over.store(true, Ordering::Relaxed);
                    return Err((seed, failure));
                }
            }
        }
        Ok(seen)
    };
    let results = thread::scope(|scope| {
        let threads = [scope.spawn(simulate), scope.spawn(simulate)];
        threads.map(|thread| thread.join().unwrap())
    });
    let mut seen = Seen::default();
    for result in results {
        match result {
            Ok(more) => seen += more,
            Err((seed, failure)) => panic!("{}", report(seed, &failure)),
        }
    }
    println!("{count} schedules: {seen:?}");
    // The schedules reached every situation that the promises are about.
    let all = [
        seen.complete,
        seen.cancelled,
        seen.gone,
        seen.refused,
        seen.grown_windows,
        seen.sent_again,
        seen.no_responders,
    ];
    assert!(count < 1000 || all.into_iter().all(|times| times > count / 100), "{seen:?}");
}
