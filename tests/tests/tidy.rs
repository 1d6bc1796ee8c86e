//! The style of this repository, as far as a program can see it.
#![cfg(not(loom))]

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};

const COLUMNS_MAX: usize = 100;
const COLUMNS_MAX_MD: usize = 140;
const FUNCTION_LINES_MAX: usize = 70;

/// The modules in which `unsafe` may stand. Everything else does without.
const UNSAFE: &[&str] = &[
    "core/src/list.rs",
    "core/src/mailbox.rs",
    "hw/src/arena.rs",
    "hw/src/file.rs",
    "hw/src/topology.rs",
    "hw/src/uring.rs",
    "hw/tests/conformance.rs",
    "runtimes/driver/src/adapter/core.rs",
    "runtimes/glommio/src/lib.rs",
    "runtimes/monoio/src/lib.rs",
    "tests/benches/core/src/allocator.rs",
    "tests/tests/loom_lending.rs",
    "tests/tests/loom_mailbox.rs",
    "tests/tests/no_alloc.rs",
];

/// Folders that are not ours to judge.
const SKIPPED: &[&str] = &["target", ".git", "corpus", "artifacts", "node_modules"];

struct Source {
    /// Relative to the root, with slashes.
    path: String,
    text: String,
}

impl Source {
    fn is(&self, extension: &str) -> bool {
        Path::new(&self.path).extension().is_some_and(|own| own == extension)
    }

    /// Numbered lines.
    fn lines(&self) -> impl Iterator<Item = (usize, &str)> {
        (1..).zip(self.text.lines())
    }
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the package is in the root").into()
}

fn collect(folder: &Path, root: &Path, found: &mut Vec<Source>) {
    for entry in std::fs::read_dir(folder).expect("a readable folder") {
        let path = entry.expect("a readable entry").path();
        let name = path.file_name().expect("a name").to_string_lossy().into_owned();
        if path.is_dir() {
            let skipped = SKIPPED.iter().any(|skipped| name == *skipped);
            if !skipped && !name.starts_with("target") && !name.starts_with("heeler-data") {
                collect(&path, root, found);
            }
            continue;
        }
        // A file that is not text is none of ours.
        let Ok(text) = std::fs::read_to_string(&path) else { continue };
        let path = path.strip_prefix(root).expect("under the root").to_string_lossy().into_owned();
        found.push(Source { path, text });
    }
}

fn sources() -> Vec<Source> {
    let root = root();
    let mut found = Vec::new();
    collect(&root, &root, &mut found);
    found.retain(|source| {
        ["rs", "toml", "sh", "md"].iter().any(|extension| source.is(extension))
            || matches!(source.path.as_str(), "Makefile" | "tests/run" | "tests/install")
    });
    found.sort_by(|a, b| a.path.cmp(&b.path));
    assert!(found.len() > 50, "the sources are there");
    found
}

/// Fails with all that was found, not just the first.
fn report(rule: &str, found: &[String]) {
    let mut text = String::new();
    for line in found {
        writeln!(text, "  {line}").expect("a string takes it");
    }
    assert!(found.is_empty(), "{rule}:\n{text}");
}

#[test]
fn lines_are_short_and_plain() {
    let mut found = Vec::new();
    for source in sources() {
        let most = if source.is("md") { COLUMNS_MAX_MD } else { COLUMNS_MAX };
        let tabs = source.path == "Makefile";
        for (number, line) in source.lines() {
            let at = format!("{}:{number}", source.path);
            let columns = line.chars().count();
            // A row of a table cannot be broken.
            if columns > most && !(source.is("md") && line.starts_with('|')) {
                found.push(format!("{at}: {columns} columns"));
            }
            if line.contains('\t') && !tabs {
                found.push(format!("{at}: a tab"));
            }
            if line.ends_with([' ', '\t']) {
                found.push(format!("{at}: ends in blanks"));
            }
            if !line.is_ascii() && source.is("rs") {
                found.push(format!("{at}: not ASCII"));
            }
        }
        if !source.text.is_empty() && !source.text.ends_with('\n') {
            found.push(format!("{}: no newline at its end", source.path));
        }
    }
    report("Lines", &found);
}

/// A line without its strings, characters and comment: what is left can be searched for words and
/// braces. `raw` is set inside a string that began on an earlier line.
fn code(line: &str, in_string: &mut bool) -> String {
    let mut out = String::new();
    let mut chars = line.chars().peekable();
    while let Some(char) = chars.next() {
        if *in_string {
            match char {
                '\\' => drop(chars.next()),
                '"' => *in_string = false,
                _ => {}
            }
            continue;
        }
        match char {
            '"' => *in_string = true,
            '/' if chars.peek() == Some(&'/') => break,
            '\'' => {
                // A character, unless it is a lifetime.
                let rest: String = chars.clone().take(2).collect();
                if rest.starts_with('\\') {
                    chars.nth(1);
                    chars.by_ref().find(|char| *char == '\'');
                } else if rest.ends_with('\'') && rest.len() > 1 {
                    chars.nth(1);
                }
            }
            _ => out.push(char),
        }
    }
    out
}

/// The functions of a file: first line, number of lines.
fn functions(source: &Source) -> Vec<(usize, usize)> {
    let mut found = Vec::new();
    let mut open: Vec<(usize, i32)> = Vec::new();
    let mut depth = 0;
    let mut starting = None;
    let mut in_string = false;
    for (number, line) in source.lines() {
        let code = code(line, &mut in_string);
        if code
            .split(|char: char| !(char.is_alphanumeric() || char == '_'))
            .any(|word| word == "fn")
        {
            starting = Some(number);
        }
        for char in code.chars() {
            match char {
                '{' => {
                    if let Some(first) = starting.take() {
                        open.push((first, depth));
                    }
                    depth += 1;
                }
                '}' => {
                    depth -= 1;
                    if open.last().is_some_and(|(_, outside)| *outside == depth) {
                        let (first, _) = open.pop().expect("looked at");
                        found.push((first, number - first + 1));
                    }
                }
                ';' if open.last().is_none_or(|(_, outside)| *outside < depth) => starting = None,
                _ => {}
            }
        }
    }
    assert_eq!(depth, 0, "the braces of {} do not match, or the test cannot read it", source.path);
    found
}

#[test]
fn functions_fit_a_screen() {
    let mut found = Vec::new();
    let mut seen = 0;
    for source in sources().iter().filter(|source| source.is("rs")) {
        // A test may tell a long story.
        let tests = source.path.contains("tests/");
        for (first, lines) in functions(source) {
            seen += 1;
            if lines > FUNCTION_LINES_MAX && !tests {
                found.push(format!("{}:{first}: {lines} lines", source.path));
            }
        }
    }
    assert!(seen > 500, "the test sees functions: {seen}");
    report("Functions", &found);
}

#[test]
fn nothing_is_left_to_do() {
    // Put together here, so that this file does not find itself.
    let words = [["TO", "DO"], ["FIX", "ME"], ["X", "XX"], ["unimpl", "emented!"], ["to", "do!"]];
    let words = words.map(|parts| parts.concat());
    let mut found = Vec::new();
    for source in sources() {
        for (number, line) in source.lines() {
            if words.iter().any(|word| line.contains(word.as_str())) {
                found.push(format!("{}:{number}: {}", source.path, line.trim()));
            }
        }
    }
    report("Left to do", &found);
}

#[test]
fn unsafe_code_is_where_it_is_expected_and_says_why() {
    let mut found = Vec::new();
    let mut seen = BTreeSet::new();
    for source in sources().iter().filter(|source| source.is("rs")) {
        let lines: Vec<&str> = source.text.lines().collect();
        let mut in_string = false;
        for (index, line) in lines.iter().enumerate() {
            let code = code(line, &mut in_string);
            let mut words = code.split(|char: char| !(char.is_alphanumeric() || char == '_'));
            if !words.any(|word| word == "unsafe") {
                continue;
            }
            seen.insert(source.path.clone());
            let at = format!("{}:{}", source.path, index + 1);
            if !UNSAFE.contains(&source.path.as_str()) {
                found.push(format!("{at}: unsafe outside the modules for it"));
            }
            // A declaration of an unsafe function states what callers promise, not why it is sound.
            let declares = code.contains("unsafe fn") || code.contains("unsafe extern");
            if !declares && !explained(&lines, index) {
                found.push(format!("{at}: no SAFETY comment"));
            }
        }
    }
    for path in UNSAFE.iter().filter(|path| !seen.contains(**path)) {
        found.push(format!("{path} needs no permission any more"));
    }
    report("Unsafe code", &found);
}

/// Whether a comment that begins with SAFETY stands on the line or before its statement.
fn explained(lines: &[&str], index: usize) -> bool {
    if lines[index].contains("// SAFETY:") {
        return true;
    }
    for line in lines[..index].iter().rev().take(12) {
        let line = line.trim();
        if line.starts_with("// SAFETY:") {
            return true;
        }
        // The statement before, or an empty line: too far.
        if !line.starts_with("//") && (line.is_empty() || line.ends_with([';', '}'])) {
            return false;
        }
    }
    false
}

#[test]
fn the_project_speaks_of_itself_only() {
    // What belongs to how the text came to be, not to what it says.
    let phrases = [
        ["issue", " #"],
        ["Issue", " #"],
        ["as an ", "AI"],
        ["language", " model"],
        ["coding", " agent"],
        ["this", " session"],
        ["previous", " session"],
        ["../", "shared/"],
        ["/wo", "rk/"],
        ["/tmp/", "plan"],
        ["reference/", "prior-art"],
    ];
    let phrases = phrases.map(|parts| parts.concat());
    let mut found = Vec::new();
    for source in sources() {
        for (number, line) in source.lines() {
            if phrases.iter().any(|phrase| line.contains(phrase.as_str())) {
                found.push(format!("{}:{number}: {}", source.path, line.trim()));
            }
        }
    }
    report("Talk of something else", &found);
}

#[test]
fn the_documents_are_there() {
    for name in ["README.md", "CHANGELOG.md", "ARCHITECTURE.md", "FORMAT.md"] {
        let text = std::fs::read_to_string(root().join(name)).unwrap_or_default();
        assert!(text.lines().count() > 5, "{name} says something");
    }
}

#[test]
fn every_module_says_what_it_is() {
    let mut found = Vec::new();
    for source in sources().iter().filter(|source| source.is("rs")) {
        let tests = source.path.contains("/tests");
        if !tests && !source.text.is_empty() && !source.text.starts_with("//!") {
            found.push(source.path.clone());
        }
    }
    report("Modules without a first line of documentation", &found);
}

#[test]
fn this_test_can_read() {
    let text = "fn a() {\n    let x = '{';\n    \"}} // {\"\n}\nfn b<'a>() -> &'a str;\n\
                fn c() { // {\n    || {\n        1\n    };\n}\n";
    let source = Source { path: "x.rs".into(), text: text.into() };
    assert_eq!(functions(&source), [(1, 4), (6, 5)]);
    let lines = ["// SAFETY: because", "let x = f(", "    unsafe { y });", "unsafe {}"];
    assert!(explained(&lines, 2) && !explained(&lines, 3));
}
