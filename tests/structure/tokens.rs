//! Rust source as tokens, as far as the imports of a file need them.

/// A word or a sign. `::` is one sign; literals and comments are left out.
#[derive(Clone, Debug)]
pub struct Token {
    pub text: String,
    pub line: usize,
}

impl Token {
    pub fn is(&self, text: &str) -> bool {
        self.text == text
    }

    pub fn is_word(&self) -> bool {
        self.text.starts_with(|c: char| c.is_alphabetic() || c == '_')
    }
}

/// The tokens of a source.
pub fn tokens(source: &str) -> Vec<Token> {
    let text: Vec<char> = source.chars().collect();
    let (mut found, mut at, mut line) = (Vec::new(), 0, 1);
    while at < text.len() {
        let end = end_of_token(&text, at);
        let token: String = text[at..end].iter().collect();
        let is_comment = token.starts_with("//") || token.starts_with("/*");
        let is_literal = token.ends_with(['"', '\'']) || token.starts_with(|c: char| c == '\'' || c.is_numeric());
        if !(is_comment || is_literal || token.trim().is_empty() || token.ends_with('#') && token.len() > 1) {
            found.push(Token { text: token.clone(), line });
        }
        line += token.matches('\n').count();
        at = end;
    }
    found
}

/// One past the token, comment, literal or white space that begins at `at`.
fn end_of_token(text: &[char], at: usize) -> usize {
    let next = |i: usize| text.get(i).copied().unwrap_or('\0');
    let while_true = |from: usize, is: &dyn Fn(char) -> bool| {
        text[from..].iter().position(|&c| !is(c)).map_or(text.len(), |length| from + length)
    };
    let is_word = |c: char| c.is_alphanumeric() || c == '_';
    match (text[at], next(at + 1)) {
        (c, _) if c.is_whitespace() => while_true(at, &char::is_whitespace),
        ('/', '/') => while_true(at, &|c| c != '\n'),
        ('/', '*') => end_of_block_comment(text, at),
        ('"', _) => end_of_string(text, at + 1),
        ('b' | 'c', '"') => end_of_string(text, at + 2),
        ('r', '"' | '#') | ('b' | 'c', 'r') if raw_string(text, at).is_some() => raw_string(text, at).unwrap(),
        // A lifetime, or a character.
        ('\'', '\\') => while_true(at + 3, &|c| c != '\'') + 1,
        ('\'', _) if next(at + 2) == '\'' => at + 3,
        ('\'', _) => while_true(at + 1, &is_word),
        (c, _) if is_word(c) => while_true(at, &is_word),
        (':', ':') => at + 2,
        _ => at + 1,
    }
}

fn end_of_block_comment(text: &[char], mut at: usize) -> usize {
    let mut depth = 0;
    loop {
        match text.get(at..at + 2) {
            Some(['/', '*']) => (depth, at) = (depth + 1, at + 2),
            Some(['*', '/']) => (depth, at) = (depth - 1, at + 2),
            Some(_) => at += 1,
            None => return text.len(),
        }
        if depth == 0 {
            return at;
        }
    }
}

fn end_of_string(text: &[char], mut at: usize) -> usize {
    while at < text.len() && text[at] != '"' {
        at += if text[at] == '\\' { 2 } else { 1 };
    }
    (at + 1).min(text.len())
}

/// One past a raw string that begins at `at`, if one does: `r"`, `r#"`, `br"`, ...
fn raw_string(text: &[char], at: usize) -> Option<usize> {
    let open = at + text[at..].iter().position(|&c| c == 'r')? + 1;
    let hashes = text[open..].iter().take_while(|&&c| c == '#').count();
    if text.get(open + hashes) != Some(&'"') {
        return None;
    }
    let close: Vec<char> = std::iter::once('"').chain(std::iter::repeat_n('#', hashes)).collect();
    let from = open + hashes + 1;
    text[from..].windows(close.len()).position(|part| part == close).map(|length| from + length + close.len())
}

/// Leaves out what only tests are built with: items under `#[test]` and `#[cfg(test)]` or `#[cfg(all(test, ...))]`.
pub fn without_tests(tokens: Vec<Token>) -> Vec<Token> {
    let (mut kept, mut at) = (Vec::new(), 0);
    while at < tokens.len() {
        if !(tokens[at].is("#") && tokens.get(at + 1).is_some_and(|token| token.is("["))) {
            kept.push(tokens[at].clone());
            at += 1;
            continue;
        }
        let end = end_of_group(&tokens, at + 1);
        let words: Vec<&str> = tokens[at + 2..end - 1].iter().map(|token| token.text.as_str()).collect();
        let is_test =
            words == ["test"] || words.first() == Some(&"cfg") && words.contains(&"test") && !words.contains(&"not");
        if is_test {
            at = end_of_item(&tokens, end);
        } else {
            kept.extend_from_slice(&tokens[at..end]);
            at = end;
        }
    }
    kept
}

/// One past the group that opens at `at`.
fn end_of_group(tokens: &[Token], mut at: usize) -> usize {
    let mut depth = 0;
    while at < tokens.len() {
        match tokens[at].text.as_str() {
            "(" | "[" | "{" => depth += 1,
            ")" | "]" | "}" => depth -= 1,
            _ => {}
        }
        at += 1;
        if depth == 0 {
            break;
        }
    }
    at
}

/// One past the item that begins at `at`: its semicolon, or its block.
fn end_of_item(tokens: &[Token], mut at: usize) -> usize {
    let mut ends_in_block = true;
    while at < tokens.len() {
        match tokens[at].text.as_str() {
            "use" | "const" | "static" | "type" => ends_in_block = false,
            "fn" => ends_in_block = true,
            ";" => return at + 1,
            "(" | "[" => at = end_of_group(tokens, at) - 1,
            "{" => {
                at = end_of_group(tokens, at) - 1;
                if ends_in_block {
                    return at + 1;
                }
            }
            _ => {}
        }
        at += 1;
    }
    at
}
