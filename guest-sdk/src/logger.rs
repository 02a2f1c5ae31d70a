//! The `log` crate's messages on the console; the level is the command line's `log=` (off, error, warn, info, debug, trace).

use log::{LevelFilter, Log, Metadata, Record};

struct ConsoleLogger;

static LOGGER: ConsoleLogger = ConsoleLogger;

impl Log for ConsoleLogger {
    fn enabled(&self, _: &Metadata<'_>) -> bool {
        // The level is the crate's global one.
        true
    }

    fn log(&self, record: &Record<'_>) {
        let now = crate::time::now();
        crate::println!(
            "[{:5}.{:06}] {:5} {}: {}",
            now.as_secs(),
            now.subsec_micros(),
            record.level(),
            record.target(),
            record.args()
        );
    }

    fn flush(&self) {}
}

/// Starts logging, at `info` unless the command line says otherwise.
pub(crate) fn init() {
    let wanted = crate::domain::CommandLine::get().value("log");
    let level = wanted.and_then(|word| word.parse().ok());
    if log::set_logger(&LOGGER).is_ok() {
        log::set_max_level(level.unwrap_or(LevelFilter::Info));
    }
    if let (Some(word), None) = (wanted, level) {
        log::warn!("log={word}: no such level; there are off, error, warn, info, debug and trace");
    }
}
