//! Tables for people: columns as wide as they have to be.

use alloc::string::String;
use alloc::vec::Vec;
use core::fmt;

/// On which side a column's text stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Align {
    /// Words.
    Left,
    /// Numbers.
    Right,
}

/// A table with a line of titles.
#[derive(Clone, Debug)]
pub struct Table<const COLUMNS: usize> {
    columns: [(&'static str, Align); COLUMNS],
    rows: Vec<[String; COLUMNS]>,
}

impl<const COLUMNS: usize> Table<COLUMNS> {
    /// An empty table.
    #[must_use]
    pub const fn new(columns: [(&'static str, Align); COLUMNS]) -> Self {
        Self { columns, rows: Vec::new() }
    }

    /// Adds a line.
    pub fn row(&mut self, cells: [String; COLUMNS]) {
        self.rows.push(cells);
    }
}

impl<const COLUMNS: usize> fmt::Display for Table<COLUMNS> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut widths = self.columns.map(|(title, _)| title.chars().count());
        for row in &self.rows {
            for (width, cell) in widths.iter_mut().zip(row) {
                *width = (*width).max(cell.chars().count());
            }
        }
        let mut line = |cells: [&str; COLUMNS]| -> fmt::Result {
            let mut text = String::new();
            for ((cell, width), (_, align)) in cells.into_iter().zip(widths).zip(self.columns) {
                use fmt::Write;
                if !text.is_empty() {
                    text.push_str("  ");
                }
                match align {
                    Align::Left => write!(text, "{cell:<width$}")?,
                    Align::Right => write!(text, "{cell:>width$}")?,
                }
            }
            writeln!(f, "{}", text.trim_end())
        };
        line(self.columns.map(|(title, _)| title))?;
        for row in &self.rows {
            line(row.each_ref().map(String::as_str))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::{Align, Table};
    use alloc::string::ToString;

    #[test]
    fn columns_are_aligned_and_lines_end_clean() {
        let mut table = Table::new([("NAME", Align::Left), ("MEM", Align::Right), ("STATE", Align::Left)]);
        table.row(["dom0".into(), "128 MiB".into(), "running".into()]);
        table.row(["a-long-name".into(), "4 MiB".into(), "".into()]);
        assert_eq!(
            table.to_string(),
            "NAME             MEM  STATE\n\
             dom0         128 MiB  running\n\
             a-long-name    4 MiB\n"
        );
    }
}
