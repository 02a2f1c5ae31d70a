//! Console.
use crate::hypercall;
use core::fmt::{self, Write};

pub(crate) struct Emergency;
impl Write for Emergency {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        // SAFETY: console_io write reads `len` bytes.
        unsafe { hypercall::raw(18, [0, text.len() as u64, text.as_ptr() as u64, 0, 0]) };
        Ok(())
    }
}
pub(crate) fn flush() {}

#[doc(hidden)]
pub fn print(a: fmt::Arguments<'_>) {
    let _ = Emergency.write_fmt(a);
}

/// Prints a line to the console.
#[macro_export]
macro_rules! println {
    () => { $crate::console::print(::core::format_args!("\n")) };
    ($($part:tt)*) => { $crate::console::print(::core::format_args!("{}\n", ::core::format_args!($($part)*))) };
}
