//! The text format of OpenMetrics 1.0.

use crate::metrics::histogram::Histogram;
use std::fmt::{self, Display, Formatter, Write};

const PREFIX: &str = "nats_presence_";

/// What a metric is.
#[derive(Clone, Copy)]
pub(crate) enum Kind {
    Counter,
    Gauge,
    Histogram,
}

/// A text with metrics, one after the other.
#[derive(Default)]
pub(crate) struct Text {
    text: String,
    /// The name and the suffix of the present metric.
    name: String,
    suffix: &'static str,
}

impl Text {
    /// Begins a metric, whose samples follow. A name that ends in `_seconds` or `_bytes` says its unit.
    pub(crate) fn metric(&mut self, name: &str, kind: Kind, help: &str) {
        self.name = format!("{PREFIX}{name}");
        let name = &self.name;
        let (kind, suffix) = match kind {
            Kind::Counter => ("counter", "_total"),
            Kind::Gauge => ("gauge", ""),
            Kind::Histogram => ("histogram", ""),
        };
        self.suffix = suffix;
        let _ = writeln!(self.text, "# TYPE {name} {kind}");
        if let Some(unit) = ["seconds", "bytes"].into_iter().find(|unit| name.ends_with(unit)) {
            let _ = writeln!(self.text, "# UNIT {name} {unit}");
        }
        let _ = writeln!(self.text, "# HELP {name} {}", Escaped(help));
    }

    /// Adds a value of the present counter or gauge.
    pub(crate) fn value(&mut self, labels: &[(&str, &str)], value: impl Display) {
        self.sample(self.suffix, labels, value);
    }

    /// Adds a value of the present histogram.
    pub(crate) fn histogram(&mut self, labels: &[(&str, &str)], histogram: &Histogram) {
        let mut count = 0;
        for (bound, below) in histogram.cumulative() {
            let bound = if bound.is_finite() { format!("{bound:?}") } else { "+Inf".into() };
            self.sample("_bucket", &[labels, &[("le", &bound)]].concat(), below);
            count = below;
        }
        self.sample("_count", labels, count);
        self.sample("_sum", labels, format_args!("{:?}", histogram.sum()));
    }

    fn sample(&mut self, suffix: &str, labels: &[(&str, &str)], value: impl Display) {
        let Text { text, name, .. } = self;
        let _ = write!(text, "{name}{suffix}");
        for (index, (label, value)) in labels.iter().enumerate() {
            let open = if index == 0 { '{' } else { ',' };
            let _ = write!(text, "{open}{label}=\"{}\"", Escaped(value));
        }
        let close = if labels.is_empty() { "" } else { "}" };
        let _ = writeln!(text, "{close} {value}");
    }

    /// Returns the complete text.
    pub(crate) fn finish(mut self) -> String {
        self.text += "# EOF\n";
        self.text
    }
}

/// A text in which backslashes, quotes and line feeds are escaped.
struct Escaped<'a>(&'a str);

impl Display for Escaped<'_> {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        for character in self.0.chars() {
            match character {
                '\\' => f.write_str("\\\\")?,
                '"' => f.write_str("\\\"")?,
                '\n' => f.write_str("\\n")?,
                other => f.write_char(other)?,
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::counters::StreamCounters;

    #[test]
    fn metrics_are_written_as_openmetrics() {
        let mut text = Text::default();
        text.metric("things", Kind::Counter, "Things.");
        text.value(&[("subject", "a\\b\"c\nd")], 3);
        text.metric("held_bytes", Kind::Gauge, "Bytes.");
        text.value(&[], 0);
        assert_eq!(
            text.finish(),
            concat!(
                "# TYPE nats_presence_things counter\n",
                "# HELP nats_presence_things Things.\n",
                "nats_presence_things_total{subject=\"a\\\\b\\\"c\\nd\"} 3\n",
                "# TYPE nats_presence_held_bytes gauge\n",
                "# UNIT nats_presence_held_bytes bytes\n",
                "# HELP nats_presence_held_bytes Bytes.\n",
                "nats_presence_held_bytes 0\n",
                "# EOF\n",
            )
        );
    }

    #[test]
    fn buckets_are_cumulative() {
        let mut text = Text::default();
        let counters = StreamCounters::default();
        text.metric("wait_seconds", Kind::Histogram, "Waiting.");
        counters.duration.observe(std::time::Duration::from_millis(700));
        text.histogram(&[("role", "worker")], &counters.duration);
        let text = text.finish();
        for line in [
            "nats_presence_wait_seconds_bucket{role=\"worker\",le=\"0.5\"} 0\n",
            "nats_presence_wait_seconds_bucket{role=\"worker\",le=\"1.0\"} 1\n",
            "nats_presence_wait_seconds_bucket{role=\"worker\",le=\"+Inf\"} 1\n",
            "nats_presence_wait_seconds_count{role=\"worker\"} 1\n",
            "nats_presence_wait_seconds_sum{role=\"worker\"} 0.7\n",
        ] {
            assert!(text.contains(line), "{text}");
        }
    }
}
