//! Tasks and timers: two beats at a time, and a main that ends them.
#![no_std]
#![no_main]

use core::time::Duration;
use guest_sdk::time::{self, Ticker};
use guest_sdk::{entry, executor, println};

#[entry]
async fn main() {
    for (name, millis) in [("slow", 300), ("fast", 100)] {
        executor::spawn(async move {
            let mut ticker = Ticker::every(Duration::from_millis(millis));
            loop {
                ticker.tick().await;
                println!("{name} tick at {:?}", time::now());
            }
        });
    }
    time::after(Duration::from_millis(1050)).await;
    println!("a second is over");
}
