//! README and the guides: they print, and every command, flag, recipe, key, file and link that they
//! name exists.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use clap::{CommandFactory as _, Parser as _};
use detco::cli::{self, Cli};
use detco::config::{Config, RECIPES};
use detco::exit;
use detco::guide::GUIDES;

/// A Markdown file of this repository.
struct Page {
    name: String,
    folder: PathBuf,
    text: String,
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn page(name: &str) -> Page {
    let path = root().join(name);
    let text = std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{name}: {error}"));
    Page { name: name.to_owned(), folder: path.parent().unwrap().to_owned(), text }
}

fn pages() -> Vec<Page> {
    let guides = GUIDES.iter().map(|guide| page(&format!("src/guide/{}.md", guide.topic)));
    std::iter::once(page("README.md")).chain(guides).collect()
}

impl Page {
    /// The lines of fenced blocks in this language, a string for each block.
    fn blocks(&self, language: &str) -> Vec<String> {
        let mut blocks = Vec::new();
        let mut lines = self.text.lines();
        while let Some(line) = lines.next() {
            let Some(of) = line.strip_prefix("```") else { continue };
            let block: Vec<&str> = lines.by_ref().take_while(|line| *line != "```").collect();
            if of == language {
                blocks.push(block.join("\n"));
            }
        }
        blocks
    }

    /// What stands between backticks, outside of fenced blocks.
    fn spans(&self) -> Vec<String> {
        let mut fenced = false;
        let prose = self.text.lines().filter(|line| {
            let fence = line.starts_with("```");
            fenced ^= fence;
            !fenced && !fence
        });
        let prose: Vec<&str> = prose.collect();
        let spans = prose.join(" ");
        spans.split('`').skip(1).step_by(2).map(str::to_owned).collect()
    }

    /// Targets of links that lead into this repository.
    fn links(&self) -> Vec<String> {
        let inline = self.text.split("](").skip(1).filter_map(|rest| rest.split(')').next());
        let defined = self.text.lines().filter(|line| line.starts_with('['));
        let defined = defined.filter_map(|line| line.split("]: ").nth(1));
        let all = inline.chain(defined).filter(|link| !link.contains("://"));
        all.map(str::to_owned).collect()
    }
}

/// The commands of a line of shell, each as its words; a comment ends the line.
fn commands(line: &str) -> Vec<Vec<String>> {
    let (mut all, mut word, mut quote) = (vec![Vec::new()], String::new(), None);
    for c in line.chars() {
        match (quote, c) {
            (Some(open), c) if c == open => quote = None,
            (None, '\'' | '"') => quote = Some(c),
            (None, '#') if word.is_empty() => break,
            (None, ' ' | '|' | ';' | '&') => {
                let words = all.last_mut().expect("never empty");
                words.extend(Some(std::mem::take(&mut word)).filter(|word| !word.is_empty()));
                if c != ' ' {
                    all.push(Vec::new());
                }
            }
            (_, c) => word.push(c),
        }
    }
    let words = all.last_mut().expect("never empty");
    words.extend(Some(word).filter(|word| !word.is_empty()));
    all.retain(|words| !words.is_empty());
    all
}

/// From the word `detco` on: launchers may stand in front.
fn of_detco(words: &[String]) -> Option<&[String]> {
    let at = words.iter().position(|word| word == "detco")?;
    Some(&words[at..])
}

/// Checks names alone, of a command that is quoted in part: subcommands and flags.
fn check_names(words: &[String]) -> Result<(), String> {
    let mut command = Cli::command();
    command.build();
    let mut rest = words[1..].iter().peekable();
    let placeholder = |word: &str| word.chars().all(|c| c.is_ascii_uppercase()) || word == "…";
    while let Some(word) = rest.peek() {
        let Some(below) = command.find_subcommand(word) else { break };
        command = below.clone();
        rest.next();
    }
    if command.has_subcommands()
        && rest.peek().is_some_and(|word| !word.starts_with('-') && !placeholder(word))
    {
        return Err(format!("no such command: {words:?}"));
    }
    for word in rest {
        let flag = word.split('=').next().unwrap_or(word);
        let known = |arg: &clap::Arg| {
            let long = arg.get_long_and_visible_aliases().unwrap_or_default();
            let short = arg.get_short().map(String::from);
            flag.strip_prefix("--").is_some_and(|name| long.contains(&name))
                || flag.strip_prefix('-').is_some_and(|name| short.as_deref() == Some(name))
        };
        if flag.starts_with('-') && !command.get_arguments().any(known) {
            return Err(format!("no {flag} of {}: {words:?}", command.get_name()));
        }
    }
    Ok(())
}

/// A whole command: it parses, its recipe is there, its overrides are legal.
fn check_command(words: &[String]) -> Result<(), String> {
    let parsed = match Cli::try_parse_from(words) {
        Ok(parsed) => parsed,
        Err(error) => return Err(format!("{words:?}: {error}")),
    };
    let cli::Command::Train(args) = parsed.command else { return Ok(()) };
    match args.recipe {
        Some(recipe) if !recipe.ends_with(".toml") => {
            match Config::load(&recipe, &args.overrides) {
                Ok(_) => Ok(()),
                Err(error) => Err(format!("{words:?}: {error}")),
            }
        }
        _ => Ok(()),
    }
}

fn detco(words: &[&str]) -> (Option<i32>, String, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_detco")).args(words).output().expect("it runs");
    let text = |bytes| String::from_utf8(bytes).expect("text");
    (output.status.code(), text(output.stdout), text(output.stderr))
}

#[test]
fn every_guide_prints() {
    for guide in GUIDES {
        let (code, said, error) = detco(&["guide", guide.topic]);
        assert_eq!((code, error.as_str()), (Some(0), ""));
        assert_eq!(said, guide.text());
        let file = page(&format!("src/guide/{}.md", guide.topic)).text;
        let rest = file.strip_prefix(said.trim_end()).expect("the file, from its beginning on");
        assert!(rest.lines().all(|line| line.is_empty() || line.starts_with('[')), "{rest}");
        assert!(said.starts_with("# ") && said.lines().count() > 30, "{said}");
    }
}

#[test]
fn guides_are_listed_and_a_wrong_topic_names_them() {
    let (code, said, error) = detco(&["guide"]);
    assert_eq!((code, error.as_str()), (Some(0), ""));
    let topics: Vec<&str> = said.lines().filter_map(|line| line.split(' ').next()).collect();
    assert_eq!(topics, GUIDES.iter().map(|guide| guide.topic).collect::<Vec<_>>());
    assert!(said.lines().all(|line| line.len() <= 100), "{said}");
    let (code, said, error) = detco(&["guide", "trainin"]);
    assert_eq!((code, said.as_str()), (Some(2), ""));
    for guide in GUIDES {
        assert!(error.contains(guide.topic), "{error}");
    }
}

#[test]
fn a_closed_pipe_ends_a_guide_quietly() {
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let mut command = Command::new(env!("CARGO_BIN_EXE_detco"));
    let command = command.args(["guide", "data"]).stdout(writer).stderr(Stdio::piped());
    let output = command.output().unwrap();
    assert_eq!((output.status.code(), output.stderr.as_slice()), (Some(0), &b""[..]));
}

#[test]
fn every_command_parses() {
    let mut seen = BTreeSet::new();
    for page in pages() {
        for block in page.blocks("sh") {
            let lines = block.replace("\\\n", " ");
            for words in lines.lines().flat_map(commands) {
                let Some(words) = of_detco(&words) else { continue };
                let partly = words.iter().any(|word| word == "…");
                let checked = if partly { check_names(words) } else { check_command(words) };
                checked.unwrap_or_else(|error| panic!("{}: {error}", page.name));
                seen.insert(words[1].clone());
            }
        }
        for span in page.spans() {
            let words = commands(&span);
            if let Some(words) = words.first().and_then(|words| of_detco(words))
                && words.len() > 1
            {
                check_names(words).unwrap_or_else(|error| panic!("{}: {error}", page.name));
            }
        }
    }
    let all: BTreeSet<_> =
        Cli::command().get_subcommands().map(|of| of.get_name().to_owned()).collect();
    seen.insert("guide".to_owned()); // README names it in a sentence
    assert_eq!(seen, all, "commands that README and the guides show");
}

#[test]
fn every_flag_exists() {
    fn flags(command: &clap::Command, into: &mut BTreeSet<String>) {
        for arg in command.get_arguments() {
            let long = arg.get_long_and_visible_aliases().unwrap_or_default();
            into.extend(long.iter().map(|name| format!("--{name}")));
            into.extend(arg.get_short().map(|name| format!("-{name}")));
        }
        command.get_subcommands().for_each(|below| flags(below, into));
    }
    let mut known = BTreeSet::new();
    flags(&Cli::command(), &mut known);
    for page in pages() {
        for span in page.spans().iter().filter(|span| span.starts_with('-')) {
            let flag = span.split([' ', '=']).next().unwrap();
            assert!(known.contains(flag), "{}: {span}", page.name);
        }
    }
}

#[test]
fn every_recipe_exists() {
    let known = |word: &str| RECIPES.iter().any(|(name, ..)| *name == word);
    for page in pages() {
        for word in page.text.split(|c: char| !c.is_ascii_alphanumeric() && !"-_.".contains(c)) {
            let word = word.trim_end_matches(['.', '-']);
            let word = word.strip_suffix(".toml").unwrap_or(word);
            let begins = ["detco-", "moco-"].iter().any(|with| word.starts_with(with));
            let ends = ["-r50", "-cifar", "-small"].iter().any(|with| word.ends_with(with));
            let other = ["detco-train", "detco-shards"].contains(&word);
            assert!(!(begins || ends) || other || known(word), "{}: {word}", page.name);
        }
    }
    let methods = page("src/guide/methods.md").text;
    for (name, ..) in RECIPES {
        assert!(methods.contains(&format!("| `{name}` |")), "{name} is not in the guide");
    }
}

#[test]
fn every_key_exists() {
    let sets = ["data.cache=c", "model.init=f", "model.init_prefix=p"].map(str::to_owned);
    let mut known = Config::load("detco-r50", &sets).unwrap().flat();
    // Keys of other methods are in their recipes.
    for (recipe, ..) in RECIPES {
        known.extend(Config::load(recipe, &[]).unwrap().flat());
    }
    let tables: BTreeSet<&str> =
        known.keys().filter_map(|key| Some(key.split_once('.')?.0)).collect();
    let mut seen = 0;
    for page in pages() {
        for span in page.spans() {
            let key = span.split(['=', ' ']).next().unwrap().trim_end_matches(".*");
            let Some((table, rest)) = key.split_once('.') else { continue };
            let named = |c: char| c.is_ascii_lowercase() || "_.".contains(c);
            if !tables.contains(table) || !rest.chars().all(named) || rest.ends_with("rs") {
                continue;
            }
            assert!(known.contains_key(key), "{}: {span}", page.name);
            seen += 1;
        }
    }
    assert!(seen > 40, "{seen} keys");
}

#[test]
fn every_file_of_toml_is_a_configuration() {
    let folder = tempfile::tempdir().unwrap();
    let mut seen = 0;
    for page in pages() {
        for block in page.blocks("toml") {
            let file = folder.path().join("own.toml");
            std::fs::write(&file, &block).unwrap();
            let config = Config::load(file.to_str().unwrap(), &[]);
            config.unwrap_or_else(|error| panic!("{}: {error}\n{block}", page.name));
            seen += 1;
        }
    }
    assert!(seen >= 2, "{seen} files");
}

#[test]
fn every_file_and_link_exists() {
    let ours = ["src/", "shards/", "tools/", "benches/", "tests/"];
    let examples = ["shards/train", "shards/val"];
    for page in pages() {
        for link in page.links() {
            assert!(page.folder.join(&link).exists(), "{}: {link}", page.name);
        }
        for span in page.spans() {
            let path = span.split(' ').next().unwrap();
            let is_ours = ours.iter().any(|folder| path.starts_with(folder));
            if is_ours && !examples.contains(&path) {
                assert!(root().join(path).exists(), "{}: {path}", page.name);
            }
        }
    }
}

/// In the documentation `[data]` leads to a module by the definitions of `src/guide.rs`, in the file by
/// its own.
#[test]
fn guides_that_are_named_are_linked() {
    let readme = page("README.md").text;
    let source = page("src/guide.rs").text;
    for guide in GUIDES {
        let topic = guide.topic;
        assert!(readme.contains(&format!("[{topic}](src/guide/{topic}.md)")), "README: {topic}");
        assert!(source.contains(&format!("[{topic}]: crate::guide::{topic}\n")), "{topic}");
        let text = page(&format!("src/guide/{topic}.md")).text;
        for other in GUIDES.iter().map(|guide| guide.topic) {
            let defined = text.contains(&format!("\n[{other}]: {other}.md"));
            assert_eq!(guide.text().contains(&format!("[{other}]")), defined, "{topic}: {other}");
        }
    }
}

#[test]
fn every_exit_code_is_in_the_guide() {
    let guide = page("src/guide/training.md").text;
    let codes =
        exit::TABLE.lines().filter(|line| line.starts_with("  ") && !line.starts_with("   "));
    let codes: Vec<&str> = codes.filter_map(|line| line.trim().split("  ").next()).collect();
    assert!(codes.len() >= 9, "{codes:?}");
    for code in codes {
        assert!(guide.contains(&format!("| {code} |")), "{code}");
    }
}

#[test]
fn every_xtask_exists() {
    let help = page("tools/src/main.rs").text;
    for page in pages() {
        for rest in page.text.split("cargo xtask ").skip(1) {
            let name = rest.split(|c: char| !(c.is_ascii_lowercase() || c == '-')).next().unwrap();
            assert!(help.contains(&format!("\n  {name} ")), "{}: {name}", page.name);
        }
    }
}
