//! Finds a ResNet among the names in a file, whatever stands before them and whoever named them.
//!
//! A backbone is told by its first two convolutions. The string before them is its prefix; where
//! several prefixes have one, the encoder that is trained comes before its average.

use std::collections::HashSet;
use std::path::Path;

use super::WeightsError;

/// Prefixes that an error names.
const LISTED_MAX: usize = 12;

/// How a file names the layers of a ResNet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Scheme {
    /// `conv1`, `bn1`, `layer1.0.conv1`: torchvision, timm, OpenSelfSup, mmdetection, VISSL.
    Torchvision,
    /// `0`, `1`, `4.0.conv1`: the children of torchvision's module in an `nn.Sequential`. The number
    /// is that of `layer1`: there may be a ReLU and a max pool before it.
    Numbered(usize),
    /// `stem.conv1`, `stem.conv1.norm`, `res2.0.conv1`.
    Detectron2,
    /// `embedder.embedder.convolution`, `encoder.stages.0.layers.0.layer.0.convolution`.
    Transformers,
}

/// A backbone in a file.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Candidate {
    prefix: String,
    scheme: Scheme,
}

/// The backbone of a file that is to be read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Choice {
    /// What stands before its names.
    pub prefix: String,
    /// Prefixes of other backbones in the file.
    pub others: Vec<String>,
    /// Whose names they are, where they are not torchvision's.
    pub named_by: Option<&'static str>,
    /// Names in the file, and torchvision's.
    pub names: Vec<(String, String)>,
}

/// Chooses the backbone to read. `wanted` is the prefix that was asked for; `is_same` tells whether
/// two names stand for the same tensor.
///
/// # Errors
/// [`WeightsError::NoBackbone`], [`WeightsError::Ambiguous`], [`WeightsError::NoSuchPrefix`],
/// [`WeightsError::Foreign`].
pub(super) fn choose(
    path: &Path,
    names: &[&str],
    wanted: Option<&str>,
    is_same: &dyn Fn(&str, &str) -> bool,
) -> Result<Choice, WeightsError> {
    let found = candidates(names);
    if found.is_empty() {
        return Err(WeightsError::NoBackbone { path: path.to_path_buf(), held: held(names) });
    }
    let chosen = match wanted {
        Some(wanted) => with_prefix(path, &found, wanted)?,
        None => preferred(path, &found, is_same)?,
    };
    let Candidate { prefix, scheme } = chosen;
    let mut chosen_names = Vec::new();
    for name in names {
        let Some(rest) = name.strip_prefix(prefix.as_str()) else { continue };
        match scheme.rename(rest) {
            Some(bare) if is_backbone(&bare) => chosen_names.push((name.to_string(), bare)),
            Some(_) => {
                let (path, tensor) = (path.to_path_buf(), name.to_string());
                return Err(WeightsError::Foreign { path, tensor });
            }
            None => {}
        }
    }
    let others = found.iter().filter(|other| *other != chosen).map(|other| other.prefix.clone());
    Ok(Choice {
        prefix: prefix.clone(),
        others: others.collect(),
        named_by: scheme.named_by(),
        names: chosen_names,
    })
}

/// All backbones, in the order of their names.
fn candidates(names: &[&str]) -> Vec<Candidate> {
    let all: HashSet<&str> = names.iter().copied().collect();
    let candidate = |prefix: &str, scheme: Scheme| {
        let [_, second] = scheme.anchors();
        let is_there = all.contains(format!("{prefix}{second}").as_str());
        is_there.then(|| Candidate { prefix: prefix.to_string(), scheme })
    };
    let mut found = Vec::new();
    for name in names {
        for scheme in [Scheme::Torchvision, Scheme::Detectron2, Scheme::Transformers] {
            let [first, _] = scheme.anchors();
            found.extend(name.strip_suffix(&first).and_then(|prefix| candidate(prefix, scheme)));
        }
        let numbered = name.strip_suffix("0.weight");
        if let Some(prefix) = numbered.filter(|prefix| prefix.is_empty() || prefix.ends_with('.')) {
            found.extend((2..=4).find_map(|layer1| candidate(prefix, Scheme::Numbered(layer1))));
        }
    }
    found
}

/// The candidate whose prefix was asked for, with or without its dot.
fn with_prefix<'a>(
    path: &Path,
    found: &'a [Candidate],
    wanted: &str,
) -> Result<&'a Candidate, WeightsError> {
    let dotted = format!("{wanted}.");
    let is_it = |prefix: &str| prefix == wanted || prefix == dotted;
    found.iter().find(|candidate| is_it(&candidate.prefix)).ok_or_else(|| {
        WeightsError::NoSuchPrefix {
            path: path.to_path_buf(),
            prefix: wanted.to_string(),
            known: list(found.iter()),
        }
    })
}

/// The candidate that training would have gone on from, if there is one such.
fn preferred<'a>(
    path: &Path,
    found: &'a [Candidate],
    is_same: &dyn Fn(&str, &str) -> bool,
) -> Result<&'a Candidate, WeightsError> {
    let best = found.iter().map(|candidate| rank(&candidate.prefix)).min();
    let best: Vec<&Candidate> =
        found.iter().filter(|candidate| Some(rank(&candidate.prefix)) == best).collect();
    let first = best[0];
    // One network under several names.
    let alias = |other: &Candidate| {
        let anchors = first.scheme.anchors().into_iter().zip(other.scheme.anchors());
        let mut names = anchors
            .map(|(one, two)| (format!("{}{one}", first.prefix), format!("{}{two}", other.prefix)));
        names.all(|(one, two)| is_same(&one, &two))
    };
    if !best[1..].iter().all(|other| alias(other)) {
        let known = list(best.into_iter());
        return Err(WeightsError::Ambiguous { path: path.to_path_buf(), known });
    }
    Ok(first)
}

fn list<'a>(found: impl ExactSizeIterator<Item = &'a Candidate>) -> String {
    let more = found.len().saturating_sub(LISTED_MAX);
    let shown = found.take(LISTED_MAX).map(|candidate| match &*candidate.prefix {
        "" => "no prefix at all".to_owned(),
        prefix => format!("{prefix:?}"),
    });
    let mut list = shown.collect::<Vec<_>>().join(", ");
    if more > 0 {
        list.push_str(&format!(" and {more} more"));
    }
    list
}

/// 0 for an encoder that is trained where another one follows it, 2 for the one that follows, 1
/// where the prefix does not say.
fn rank(prefix: &str) -> u8 {
    let prefix = prefix.to_ascii_lowercase();
    let word = |words: &[&str]| {
        prefix.split(|c: char| !c.is_ascii_alphanumeric()).any(|part| words.contains(&part))
    };
    let part = |parts: &[&str]| parts.iter().any(|part| prefix.contains(part));
    let follows = part(&["teacher", "target", "momentum", "average", "shadow"])
        || word(&["k", "key", "ema", "avg", "averaged", "mean", "swa", "slow", "moving"]);
    let trained = part(&["student", "online", "query"]) || word(&["q", "base"]);
    match (follows, trained) {
        (true, _) => 2,
        (false, true) => 0,
        (false, false) => 1,
    }
}

/// What a file holds, for an error: whose ResNet cannot be read, or the first names.
fn held(names: &[&str]) -> String {
    let second = "layer1.0.conv1.weight";
    if let Some(prefix) = names.iter().find_map(|name| name.strip_suffix(second)) {
        return format!(
            "{prefix}{second}, but no {prefix}conv1.weight: a ResNet with a deep stem, or another \
             network"
        );
    }
    let mut held = names.iter().take(3).copied().collect::<Vec<_>>().join(", ");
    if names.len() > 3 {
        held.push_str(&format!(", … ({} tensors)", names.len()));
    } else if names.is_empty() {
        held.push_str("no tensors");
    }
    held
}

impl Scheme {
    /// The names of the stem's convolution, and of the first one behind it.
    fn anchors(self) -> [String; 2] {
        let (first, second) = match self {
            Scheme::Torchvision => ("conv1.weight", "layer1.0.conv1.weight"),
            Scheme::Numbered(layer1) => {
                return ["0.weight".into(), format!("{layer1}.0.conv1.weight")];
            }
            Scheme::Detectron2 => ("stem.conv1.weight", "res2.0.conv1.weight"),
            Scheme::Transformers => (
                "embedder.embedder.convolution.weight",
                "encoder.stages.0.layers.0.layer.0.convolution.weight",
            ),
        };
        [first.into(), second.into()]
    }

    fn named_by(self) -> Option<&'static str> {
        match self {
            Scheme::Torchvision => None,
            Scheme::Numbered(_) => Some("numbered as the children of an nn.Sequential"),
            Scheme::Detectron2 => Some("named as in detectron2"),
            Scheme::Transformers => Some("named as in transformers"),
        }
    }

    /// torchvision's name for a name behind the prefix; `None` for what is no part of a backbone.
    /// What only looks like one gets a name that [`is_backbone`] refuses.
    fn rename(self, rest: &str) -> Option<String> {
        let parts: Vec<&str> = rest.split('.').collect();
        let join = |head: &[&str], tail: &[&str]| [head, tail].concat().join(".");
        match self {
            Scheme::Torchvision => {
                let is_inside = ["conv1.", "bn1.", "layer"].iter().any(|s| rest.starts_with(s));
                is_inside.then(|| rest.replace(".shortcut.", ".downsample."))
            }
            Scheme::Numbered(layer1) => {
                let (child, tail) = (parts[0].parse::<usize>().ok()?, &parts[1..]);
                let layer = format!("layer{}", child.wrapping_sub(layer1).wrapping_add(1));
                let head = match child {
                    0 => "conv1",
                    1 => "bn1",
                    _ if (layer1..layer1 + 4).contains(&child) => layer.as_str(),
                    _ => return None,
                };
                Some(join(&[head], tail).replace(".shortcut.", ".downsample."))
            }
            Scheme::Detectron2 => {
                let stage = parts[0].strip_prefix("res").and_then(|n| n.parse::<usize>().ok());
                let layer = stage.map(|n| format!("layer{}", n.wrapping_sub(1)));
                match parts[..] {
                    ["stem", "conv1", "norm", leaf] => Some(join(&["bn1"], &[leaf])),
                    ["stem", ref tail @ ..] => Some(tail.join(".")),
                    [_, block, ref tail @ ..] => {
                        let layer = layer?;
                        let tail = detectron2_block(tail);
                        Some(format!("{layer}.{block}.{tail}"))
                    }
                    _ => None,
                }
            }
            Scheme::Transformers => transformers(&parts),
        }
    }
}

/// `conv1.norm.bias` to `bn1.bias`, `shortcut.norm.bias` to `downsample.1.bias`.
fn detectron2_block(tail: &[&str]) -> String {
    match *tail {
        ["shortcut", "norm", leaf] => format!("downsample.1.{leaf}"),
        ["shortcut", leaf] => format!("downsample.0.{leaf}"),
        [conv, "norm", leaf] => format!("{}.{leaf}", conv.replacen("conv", "bn", 1)),
        _ => tail.join("."),
    }
}

fn transformers(parts: &[&str]) -> Option<String> {
    match *parts {
        ["embedder", "embedder", "convolution", leaf] => Some(format!("conv1.{leaf}")),
        ["embedder", "embedder", "normalization", leaf] => Some(format!("bn1.{leaf}")),
        ["encoder", "stages", stage, "layers", block, ref tail @ ..] => {
            let layer = stage.parse::<usize>().ok()?.checked_add(1)?;
            let next = |n: &str| n.parse::<usize>().ok()?.checked_add(1);
            let tail = match *tail {
                ["layer", n, "convolution", leaf] => format!("conv{}.{leaf}", next(n)?),
                ["layer", n, "normalization", leaf] => format!("bn{}.{leaf}", next(n)?),
                ["shortcut", "convolution", leaf] => format!("downsample.0.{leaf}"),
                ["shortcut", "normalization", leaf] => format!("downsample.1.{leaf}"),
                _ => tail.join("."),
            };
            Some(format!("layer{layer}.{block}.{tail}"))
        }
        _ => None,
    }
}

/// Whether a name is one of a torchvision ResNet's without its `fc`.
pub fn is_backbone(name: &str) -> bool {
    let numbered = |part: &str, word: &str, most: &str| {
        part.strip_prefix(word).is_some_and(|n| n.len() == 1 && "1" <= n && n <= most)
    };
    let norm = |part: &str| {
        matches!(part, "weight" | "bias" | "running_mean" | "running_var" | "num_batches_tracked")
    };
    let parts: Vec<&str> = name.split('.').collect();
    match parts[..] {
        ["conv1", "weight"] => true,
        ["bn1", leaf] => norm(leaf),
        [layer, block, ref rest @ ..] => {
            let block = !block.is_empty() && block.bytes().all(|byte| byte.is_ascii_digit());
            numbered(layer, "layer", "4")
                && block
                && match *rest {
                    [conv, "weight"] if numbered(conv, "conv", "3") => true,
                    [bn, leaf] if numbered(bn, "bn", "3") => norm(leaf),
                    ["downsample", "0", "weight"] => true,
                    ["downsample", "1", leaf] => norm(leaf),
                    _ => false,
                }
        }
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_names_of_a_resnet_and_no_others() {
        for name in [
            "conv1.weight",
            "bn1.num_batches_tracked",
            "layer1.0.conv3.weight",
            "layer4.22.bn2.running_var",
            "layer2.0.downsample.0.weight",
            "layer2.0.downsample.1.bias",
        ] {
            assert!(is_backbone(name), "{name}");
        }
        for name in [
            "fc.weight",
            "conv1.bias",
            "layer5.0.conv1.weight",
            "layer1.0.conv4.weight",
            "layer1..conv1.weight",
            "layer1.0.se.weight",
            "layer1.0.downsample.0.bias",
            "layer1.0",
            "",
        ] {
            assert!(!is_backbone(name), "{name}");
        }
    }

    /// Chooses among networks of two convolutions below these prefixes, of which none are the same.
    fn chosen(prefixes: &[&str], wanted: Option<&str>) -> Result<Choice, WeightsError> {
        let both = |prefix: &&str| {
            [format!("{prefix}conv1.weight"), format!("{prefix}layer1.0.conv1.weight")]
        };
        let names: Vec<String> = prefixes.iter().flat_map(both).collect();
        let names: Vec<&str> =
            names.iter().map(String::as_str).chain(["fc.weight", "queue"]).collect();
        choose(Path::new("x"), &names, wanted, &|_, _| false)
    }

    #[test]
    fn any_one_prefix_is_found() {
        for prefix in [
            "",
            "module.",
            "_orig_mod.",
            "module._orig_mod.",
            "encoder_q.0.",
            "module.base_encoder.",
            "model.backbone.",
            "trunk.",
            "resnet.",
            "student.backbone.",
            "state_dict.a.b.c.d.e.",
            "encoder_k.",
            "net_",
            "mein Netz/",
        ] {
            let choice = chosen(&[prefix], None).unwrap();
            assert_eq!((choice.prefix.as_str(), choice.others.len()), (prefix, 0));
            let names = [("conv1.weight"), ("layer1.0.conv1.weight")];
            let names = names.map(|name| (format!("{prefix}{name}"), name.to_string()));
            assert_eq!(choice.names, names);
        }
    }

    #[test]
    fn the_trained_encoder_comes_before_its_average() {
        for (trained, average) in [
            ("module.encoder_q.", "module.encoder_k."),
            ("query.backbone.", "key.backbone."),
            ("student.module.backbone.", "teacher.backbone."),
            ("online_encoder.net.", "target_encoder.net."),
            ("module.base_encoder.", "module.momentum_encoder."),
            ("backbone.", "momentum_backbone."),
            ("model.", "model_ema."),
            ("state_dict.", "ema_state_dict."),
            ("module.encoder.", "module.encoder_k."),
        ] {
            for prefixes in [[trained, average], [average, trained]] {
                let choice = chosen(&prefixes, None).unwrap();
                assert_eq!(
                    (choice.prefix.as_str(), choice.others),
                    (trained, vec![average.into()])
                );
                let asked = chosen(&prefixes, Some(average)).unwrap();
                assert_eq!(asked.prefix, average);
                let asked = chosen(&prefixes, Some(average.trim_end_matches('.'))).unwrap();
                assert_eq!(asked.prefix, average);
            }
        }
    }

    #[test]
    fn what_cannot_be_decided_is_listed() {
        let error = chosen(&["rgb.", "flow.", "ema."], None).unwrap_err().to_string();
        assert!(error.contains("below \"rgb.\", \"flow.\"\nhint: --init-prefix"), "{error}");
        let error = chosen(&["rgb.", "flow."], Some("depth.")).unwrap_err().to_string();
        assert!(error.contains("\"depth.\", but below \"rgb.\", \"flow.\""), "{error}");
        assert_eq!(chosen(&["rgb.", "flow."], Some("flow")).unwrap().prefix, "flow.");
        let many: Vec<String> = (0..100_000).map(|i| format!("net{i}.")).collect();
        let many: Vec<&str> = many.iter().map(String::as_str).collect();
        let error = chosen(&many, None).unwrap_err().to_string();
        assert!(error.contains("and 99988 more"), "{error}");
        // One network under two names.
        let names = ["a.conv1.weight", "a.layer1.0.conv1.weight"];
        let names = [names[0], names[1], "b.conv1.weight", "b.layer1.0.conv1.weight"];
        let choice = choose(Path::new("x"), &names, None, &|_, _| true).unwrap();
        assert_eq!(choice.prefix, "a.");
    }

    #[test]
    fn the_query_encoder_is_chosen_and_the_key_encoder_left() {
        let never = &|_: &str, _: &str| false;
        let names = ["module.encoder_k.conv1.weight", "module.encoder_q.conv1.weight"];
        let second =
            ["module.encoder_k.layer1.0.conv1.weight", "module.encoder_q.layer1.0.conv1.weight"];
        let names = [
            names[0],
            second[0],
            names[1],
            "module.encoder_q.fc.0.weight",
            second[1],
            "module.queue",
        ];
        let chosen = choose(Path::new("x"), &names, None, never).unwrap().names;
        let expected = [(names[2], "conv1.weight"), (second[1], "layer1.0.conv1.weight")];
        assert_eq!(chosen, expected.map(|(name, bare)| (name.to_string(), bare.to_string())));
        let se = ["conv1.weight", "layer1.0.conv1.weight", "layer1.0.se.weight"];
        let error = choose(Path::new("x"), &se, None, never).unwrap_err();
        assert!(error.to_string().contains("layer1.0.se.weight"), "{error}");
        let error = choose(Path::new("x"), &["a", "b", "c", "d"], None, never).unwrap_err();
        assert!(error.to_string().contains("a, b, c, … (4 tensors)"), "{error}");
    }

    #[test]
    fn other_programs_names_are_translated() {
        for (scheme, theirs, ours) in [
            (Scheme::Numbered(4), "0.weight", "conv1.weight"),
            (Scheme::Numbered(4), "1.running_var", "bn1.running_var"),
            (Scheme::Numbered(4), "7.2.conv3.weight", "layer4.2.conv3.weight"),
            (Scheme::Numbered(2), "3.0.shortcut.1.bias", "layer2.0.downsample.1.bias"),
            (Scheme::Torchvision, "layer2.0.shortcut.0.weight", "layer2.0.downsample.0.weight"),
            (Scheme::Detectron2, "stem.conv1.norm.bias", "bn1.bias"),
            (Scheme::Detectron2, "res4.22.conv3.norm.weight", "layer3.22.bn3.weight"),
            (Scheme::Detectron2, "res5.0.shortcut.norm.bias", "layer4.0.downsample.1.bias"),
            (Scheme::Transformers, "embedder.embedder.normalization.bias", "bn1.bias"),
            (
                Scheme::Transformers,
                "encoder.stages.3.layers.1.layer.2.normalization.weight",
                "layer4.1.bn3.weight",
            ),
        ] {
            assert_eq!(scheme.rename(theirs).as_deref(), Some(ours), "{theirs}");
            assert!(is_backbone(ours));
        }
        for (scheme, theirs) in [
            (Scheme::Numbered(4), "9.weight"),
            (Scheme::Numbered(4), "2.weight"),
            (Scheme::Detectron2, "linear.weight"),
            (Scheme::Transformers, "classifier.1.weight"),
            (Scheme::Torchvision, "fc.weight"),
        ] {
            assert_eq!(scheme.rename(theirs), None, "{theirs}");
        }
    }
}
