//! The modules of a crate, what each names, and the file that every name is defined in.

use std::collections::{BTreeMap, BTreeSet};

use crate::tokens::{Token, tokens, without_tests};

/// Sources by path from the crate's folder, for example "device/mod.rs".
pub type Sources = BTreeMap<String, String>;
/// Why a file imports another: the line and the path that it names.
pub type Reason = (usize, String);
/// From file to file.
pub type Imports = BTreeMap<(String, String), Reason>;

type Path = Vec<String>;
/// The names that were looked for on the way, so that imports which go in circles end.
type Seen = BTreeSet<(usize, String)>;

#[derive(Default)]
struct Module {
    file: String,
    parent: Option<usize>,
    children: BTreeMap<String, usize>,
    items: BTreeSet<String>,
    /// What `use` brings in, by the name it has here. A re-export is an import only where this module uses the name.
    names: BTreeMap<String, Import>,
    globs: Vec<Import>,
    /// Paths of several segments outside `use`.
    paths: Vec<(Path, usize)>,
    words: BTreeMap<String, usize>,
}

#[derive(Clone)]
struct Import {
    path: Path,
    line: usize,
    is_reexport: bool,
}

pub struct Crate {
    modules: Vec<Module>,
}

#[derive(Clone, Copy)]
enum Target {
    Module(usize),
    /// Something that this module defines.
    Item(usize),
}

impl Crate {
    /// Reads a crate from its root file.
    pub fn read(sources: &Sources, root: &str) -> Crate {
        let mut this = Crate { modules: Vec::new() };
        this.read_file(sources, root, None);
        this
    }

    /// The files of the crate that are not only for tests.
    pub fn files(&self) -> BTreeSet<&str> {
        self.modules.iter().map(|module| module.file.as_str()).collect()
    }

    fn read_file(&mut self, sources: &Sources, file: &str, parent: Option<usize>) -> usize {
        let source = sources.get(file).unwrap_or_else(|| panic!("{file} is not there"));
        let tokens = without_tests(tokens(source));
        let module = self.add(file, parent);
        let mut at = 0;
        self.read_module(sources, module, &tokens, &mut at);
        module
    }

    fn add(&mut self, file: &str, parent: Option<usize>) -> usize {
        self.modules.push(Module { file: file.to_string(), parent, ..Module::default() });
        self.modules.len() - 1
    }

    /// Reads up to the brace that closes the module.
    fn read_module(&mut self, sources: &Sources, id: usize, tokens: &[Token], at: &mut usize) {
        let (mut depth, mut is_public) = (0, false);
        while let Some(token) = tokens.get(*at) {
            let after = tokens.get(*at + 1).filter(|token| token.is_word()).map(|token| token.text.clone());
            let before = at.checked_sub(1).map_or("", |before| tokens[before].text.as_str());
            match (token.text.as_str(), after) {
                ("}", _) if depth == 0 => return,
                ("{", _) => depth += 1,
                ("}", _) => depth -= 1,
                ("use", _) if before != "::" => {
                    *at += 1;
                    let (line, mut imports) = (token.line, Vec::new());
                    use_tree(tokens, at, Vec::new(), &mut imports);
                    for (path, name) in imports {
                        let import = Import { path, line, is_reexport: is_public };
                        match name {
                            Some(name) => drop(self.modules[id].names.insert(name, import)),
                            None => self.modules[id].globs.push(import),
                        }
                    }
                }
                ("mod", Some(name)) => {
                    *at += 2;
                    let child = if tokens[*at].is("{") {
                        *at += 1;
                        let file = self.modules[id].file.clone();
                        let child = self.add(&file, Some(id));
                        self.read_module(sources, child, tokens, at);
                        child
                    } else {
                        self.read_file(sources, &self.file_of(sources, id, &name), Some(id))
                    };
                    self.modules[id].children.insert(name, child);
                }
                ("fn" | "struct" | "enum" | "union" | "trait" | "type" | "const" | "static", Some(name))
                    if depth == 0 =>
                {
                    self.modules[id].items.insert(name);
                }
                (text, _) if token.is_word() && !matches!(before, "::" | ".") => {
                    let mut path = vec![text.to_string()];
                    while tokens.get(*at + 1).is_some_and(|token| token.is("::"))
                        && tokens.get(*at + 2).is_some_and(Token::is_word)
                    {
                        path.push(tokens[*at + 2].text.clone());
                        *at += 2;
                    }
                    self.modules[id].words.entry(text.to_string()).or_insert(token.line);
                    if path.len() > 1 {
                        self.modules[id].paths.push((path, token.line));
                    }
                }
                _ => {}
            }
            // `pub use`, `pub(crate) use`
            is_public = match tokens.get(*at).map(|token| token.text.as_str()) {
                Some("pub") => true,
                Some("(" | ")" | "crate" | "super" | "in" | "::") => is_public,
                _ => false,
            };
            *at += 1;
        }
    }

    fn file_of(&self, sources: &Sources, parent: usize, name: &str) -> String {
        let file = &self.modules[parent].file;
        let folder = match file.rsplit_once('/') {
            Some((folder, "mod.rs" | "main.rs")) => format!("{folder}/"),
            None if file == "lib.rs" || file == "main.rs" => String::new(),
            _ => format!("{}/", file.trim_end_matches(".rs")),
        };
        let flat = format!("{folder}{name}.rs");
        if sources.contains_key(&flat) { flat } else { format!("{folder}{name}/mod.rs") }
    }

    /// What imports what, and why.
    pub fn imports(&self) -> Imports {
        let mut found = Imports::new();
        for (id, module) in self.modules.iter().enumerate() {
            let mut add = |target: Option<Target>, line: usize, path: &Path| {
                let to = match target {
                    Some(Target::Item(to)) => &self.modules[to].file,
                    // The name of a folder is no import of what its mod.rs defines.
                    Some(Target::Module(to)) if !self.modules[to].is_folder() => &self.modules[to].file,
                    _ => return,
                };
                if *to != module.file {
                    found.entry((module.file.clone(), to.clone())).or_insert((line, path.join("::")));
                }
            };
            for (name, import) in &module.names {
                if !import.is_reexport || module.words.contains_key(name) {
                    add(self.resolve(id, &import.path, &mut Seen::new()), import.line, &import.path);
                }
            }
            for (path, line) in &module.paths {
                add(self.resolve(id, path, &mut Seen::new()), *line, path);
            }
            for glob in &module.globs {
                let target = self.resolve(id, &glob.path, &mut Seen::new());
                if !glob.is_reexport {
                    add(target, glob.line, &glob.path);
                }
                if let Some(Target::Module(from)) = target {
                    for (word, line) in &module.words {
                        if !module.defines(word) {
                            let path = glob.path.iter().chain([word]).cloned().collect();
                            add(self.member(from, word, &mut Seen::new()), *line, &path);
                        }
                    }
                }
            }
        }
        found
    }

    /// What a path names, seen from a module. None: something of another crate, or of a function.
    fn resolve(&self, module: usize, path: &[String], seen: &mut Seen) -> Option<Target> {
        let mut target = match path.first()?.as_str() {
            "crate" => Target::Module(0),
            "self" => Target::Module(module),
            "super" => Target::Module(self.modules[module].parent?),
            name => self.member(module, name, seen)?,
        };
        for name in &path[1..] {
            let Target::Module(inside) = target else { break };
            target = match name.as_str() {
                "self" => continue,
                "super" => Target::Module(self.modules[inside].parent?),
                // What a macro makes is not seen: it is of the module that it is named by.
                name => self.member(inside, name, seen).unwrap_or(Target::Item(inside)),
            };
        }
        Some(target)
    }

    fn member(&self, module: usize, name: &str, seen: &mut Seen) -> Option<Target> {
        if !seen.insert((module, name.to_string())) {
            return None;
        }
        let this = &self.modules[module];
        if let Some(&child) = this.children.get(name) {
            return Some(Target::Module(child));
        }
        if let Some(import) = this.names.get(name) {
            let from = if import.path[0] == name { this.parent } else { Some(module) };
            return self.resolve(from.filter(|_| import.path.len() > 1)?, &import.path, seen);
        }
        if this.items.contains(name) {
            return Some(Target::Item(module));
        }
        this.globs.iter().find_map(|glob| match self.resolve(module, &glob.path, seen)? {
            Target::Module(from) if from != module => self.member(from, name, seen),
            _ => None,
        })
    }
}

impl Module {
    fn is_folder(&self) -> bool {
        self.file.ends_with("mod.rs") || self.file.ends_with("lib.rs") || self.file.ends_with("main.rs")
    }

    fn defines(&self, name: &str) -> bool {
        self.children.contains_key(name) || self.names.contains_key(name) || self.items.contains(name)
    }
}

/// Reads one tree of a `use` up to what ends it: paths with the names that they get, none for a glob.
fn use_tree(tokens: &[Token], at: &mut usize, mut path: Path, found: &mut Vec<(Path, Option<String>)>) {
    loop {
        let token = &tokens[*at];
        *at += 1;
        match token.text.as_str() {
            "::" => {}
            "*" => return found.push((path, None)),
            "{" => {
                while !tokens[*at].is("}") {
                    use_tree(tokens, at, path.clone(), found);
                    if tokens[*at].is(",") {
                        *at += 1;
                    }
                }
                *at += 1;
                return;
            }
            "as" => {
                let name = tokens[*at].text.clone();
                *at += 1;
                return found.push((path, Some(name)));
            }
            // `a::b::{self}` brings in b.
            "self" if !path.is_empty() => {}
            name => path.push(name.to_string()),
        }
        if matches!(tokens[*at].text.as_str(), ";" | "," | "}") {
            let name = path.last().cloned();
            return found.push((path, name));
        }
    }
}
