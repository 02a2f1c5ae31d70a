//! Structures of `hypercall-abi`: sizes and offsets from its layout table, types and meanings from its source.

use crate::sh;
use anyhow::{Context, Result, bail};
use std::collections::BTreeMap;
use std::path::PathBuf;

/// A structure of the ABI.
pub struct Structure {
    /// `module::Type` in the crate.
    pub rust: &'static str,
    /// The type's name in C.
    pub c: &'static str,
    /// Bytes.
    pub size: usize,
    /// What it is for.
    pub description: String,
    /// In the order of the layout table.
    pub fields: Vec<Field>,
}

/// A field of one.
pub struct Field {
    /// Its name in C.
    pub c: &'static str,
    /// Bytes from the start.
    pub offset: usize,
    /// Its type in Rust.
    pub kind: String,
    /// What it holds.
    pub description: String,
}

/// A row of the layout table, fields as name in Rust, name in C, offset.
type Row = (&'static str, &'static str, usize, Vec<(&'static str, &'static str, usize)>);

macro_rules! c_name {
    ($field:ident) => {
        stringify!($field)
    };
    ($field:ident $c_field:literal) => {
        $c_field
    };
}

macro_rules! joined {
    ($first:ident $(:: $rest:ident)*) => {
        concat!(stringify!($first) $(, "::", stringify!($rest))*)
    };
}

macro_rules! rows {
    ($($($module:ident)::+ = $c_type:literal, $size:literal {
        $($field:ident $(= $c_field:literal)? @ $offset:literal),* $(,)?
    };)*) => {
        vec![$((
            joined!($($module)::+),
            $c_type,
            $size,
            vec![$((stringify!($field), c_name!($field $($c_field)?), $offset)),*],
        )),*]
    };
}

/// All structures, by their names in the crate.
///
/// # Errors
/// When the source of one cannot be found or understood.
pub fn all() -> Result<BTreeMap<&'static str, Structure>> {
    let rows: Vec<Row> = hypercall_abi::for_each_layout!(rows);
    let mut sources: BTreeMap<PathBuf, String> = BTreeMap::new();
    let mut structures = BTreeMap::new();
    for (rust, c, size, fields) in rows {
        let (module, name) = rust.rsplit_once("::").context("a row of the layout table names no module")?;
        let path = PathBuf::from(format!("hypercall-abi/src/{}.rs", module.replace("::", "/")));
        if !sources.contains_key(&path) {
            let text = String::from_utf8(sh::read(&sh::root().join(&path))?)?;
            sources.insert(path.clone(), text);
        }
        let (description, documented) =
            parse(&sources[&path], name).with_context(|| format!("{}: {name}", path.display()))?;
        let field = |(name, c, offset): (&str, &'static str, usize)| -> Result<Field> {
            let Some((kind, description)) = documented.get(name) else {
                bail!("{}: the layout table has a field {name} that {rust} has not", path.display());
            };
            Ok(Field { c, offset, kind: kind.clone(), description: description.clone() })
        };
        let fields = fields.into_iter().map(field).collect::<Result<_>>()?;
        structures.insert(rust, Structure { rust, c, size, description, fields });
    }
    Ok(structures)
}

/// Fields of a structure: type and documentation by name.
type Documented = BTreeMap<String, (String, String)>;

/// Reads one structure from formatted source: its documentation, and each field's.
fn parse(text: &str, name: &str) -> Result<(String, Documented)> {
    let head = format!("pub struct {name}");
    let lines: Vec<&str> = text.lines().collect();
    let starts = |line: &str| line.strip_prefix(&head).is_some_and(|rest| rest.starts_with([' ', '<', '(']));
    let Some(at) = lines.iter().position(|line| starts(line)) else { bail!("there is no such structure") };
    let above = lines[..at].iter().rev().take_while(|line| line.starts_with("///") || line.starts_with('#'));
    let mut doc: Vec<&str> = above.filter_map(|line| line.strip_prefix("///")).collect();
    doc.reverse();
    let mut fields = Documented::new();
    let mut comment = String::new();
    for line in lines[at + 1..].iter().take_while(|line| **line != "}") {
        let line = line.trim();
        if let Some(text) = line.strip_prefix("///") {
            comment.push_str(text);
        } else if let Some((name, kind)) = line.strip_prefix("pub ").unwrap_or(line).split_once(": ") {
            fields.insert(
                name.to_owned(),
                (kind.trim_end_matches(',').to_owned(), std::mem::take(&mut comment)),
            );
        }
    }
    // The summary alone: what follows the first empty line is for who writes Rust.
    let doc: Vec<&str> = doc.into_iter().take_while(|line| !line.trim().is_empty()).collect();
    Ok((doc.join(" ").trim().to_owned(), fields))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_documentation_and_types() -> Result<()> {
        let text = "/// Before.\npub struct Thing2 {\n}\n\n/// A thing.\n///\n/// More.\n#[repr(C)]\npub struct Thing {\n    \
                    /// First,\n    /// in two lines.\n    pub a: [u8; 4],\n    /// Second.\n    pub b: GuestHandle<Port>,\n}\n";
        let (doc, fields) = parse(text, "Thing")?;
        assert_eq!(doc, "A thing.");
        assert_eq!(fields["a"], ("[u8; 4]".to_owned(), " First, in two lines.".to_owned()));
        assert_eq!(fields["b"].0, "GuestHandle<Port>");
        assert!(parse(text, "Thin").is_err());
        Ok(())
    }
}
