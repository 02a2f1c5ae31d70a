//! Sizes and offsets, from the crate's table and from the structs themselves.

use crate::Fact;

/// Size of a field's type.
fn size_of_field<T, F>(_: fn(&T) -> &F) -> usize {
    size_of::<F>()
}

macro_rules! c_name {
    ($field:ident) => {
        stringify!($field)
    };
    ($field:ident $c_field:literal) => {
        $c_field
    };
}

/// How C says where the ring's slots begin; Xen's struct has the first slot in it, ours has not.
fn size_expression(c_type: &str) -> String {
    match c_type {
        "struct blkif_sring" => "offsetof(struct blkif_sring, ring)".into(),
        other => format!("sizeof({other})"),
    }
}

macro_rules! collect {
    ($($($module:ident)::+ = $c_type:literal, $size:literal {
        $($field:ident $(= $c_field:literal)? @ $offset:literal),* $(,)?
    };)*) => {{
        let mut facts = Vec::new();
        $({
            use hypercall_abi::$($module)::+ as Type;
            facts.push(Fact::new(size_expression($c_type), size_of::<Type>() as i128));
            $({
                let field = c_name!($field $($c_field)?);
                let offset = core::mem::offset_of!(Type, $field) as i128;
                facts.push(Fact::new(format!("offsetof({}, {field})", $c_type), offset));
                let size = size_of_field(|value: &Type| &value.$field) as i128;
                facts.push(Fact::new(format!("sizeof((({} *)0)->{field})", $c_type), size));
            })*
        })*
        facts
    }};
}

/// Every size, offset and field size.
#[must_use]
pub fn layouts() -> Vec<Fact> {
    let mut facts = hypercall_abi::for_each_layout!(collect);
    facts.extend(hypercall_abi::for_each_control_layout!(collect));
    facts
}
