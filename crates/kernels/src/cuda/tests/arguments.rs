//! Structs that kernels are given have the same fields in both texts: their sizes, which both sides assert, do not tell
//! one field more from the gap that was at the end.

use super::super::compile::SOURCES;

const OF_HOST: [&str; 9] = [
    include_str!("../adapters.rs"),
    include_str!("../attention.rs"),
    include_str!("../decode.rs"),
    include_str!("../grouped.rs"),
    include_str!("../pack.rs"),
    include_str!("../products.rs"),
    include_str!("../route.rs"),
    include_str!("../rows.rs"),
    include_str!("../tokens.rs"),
];

/// What kernels call a type of the host.
fn in_kernels(host: &str) -> &str {
    match host {
        "Address" => "*",
        "f32" => "float",
        "Argument" => "Grouped",
        "Job" => "PackJob",
        "TablesArgument" => "Routing",
        _ => host.strip_suffix("Argument").unwrap_or(host),
    }
}

/// The types of the fields of a struct of the host, whose text this is from the name on, and the name.
fn of_host(text: &str) -> (&str, Vec<&str>) {
    let (name, rest) = text.split_once(" {\n").unwrap();
    let (fields, _) = rest.split_once("\n}").unwrap();
    let types = fields
        .lines()
        .map(|line| line.trim().strip_suffix(',').unwrap())
        .map(|field| field.split_once(": ").unwrap().1)
        .map(|of| of.trim_start_matches('[').split(';').next().unwrap());
    (in_kernels(name), types.map(in_kernels).collect())
}

/// The same of a struct of a kernel's text, if it is there.
fn of_kernel<'a>(text: &'a str, name: &str) -> Option<Vec<&'a str>> {
    let (_, rest) = text.split_once(&format!("struct {name} {{\n"))?;
    let (fields, _) = rest.split_once("\n};").unwrap();
    let mut types = Vec::new();
    for line in fields.lines() {
        let (code, _) = line.split_once("//").unwrap_or((line, ""));
        let Some(field) = code.trim().strip_suffix(';').filter(|f| !f.contains('(')) else {
            continue;
        };
        let of = match field.contains('*') {
            true => "*",
            false => field.split(' ').next().unwrap(),
        };
        types.extend(field.split(',').map(|_| of));
    }
    Some(types)
}

#[test]
fn arguments_have_the_fields_that_kernels_read() {
    let texts = SOURCES.map(|source| (source.name, source.text()));
    let mut compared = 0;
    for host in OF_HOST {
        for text in host.split("#[repr(C)]\n").skip(1) {
            let (_, text) = text.split_once("struct ").unwrap();
            let (name, expected) = of_host(text);
            let before = compared;
            for (source, text) in &texts {
                if let Some(fields) = of_kernel(text, name) {
                    assert_eq!(fields, expected, "`{name}` of {source}");
                    compared += 1;
                }
            }
            assert!(compared > before, "no kernel has `{name}`");
        }
    }
    assert!(compared > 40, "{compared}");
}
