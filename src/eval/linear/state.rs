//! What a broken-off training of classifiers goes on from: one file, written after each epoch.

use std::collections::HashMap;
use std::path::Path;

use tch::Tensor;

use super::LinearError;
use super::sgd::Level;

/// Writes the state after `epoch` epochs of what `key` names. The file appears whole.
pub(super) fn save(
    file: &Path,
    key: &str,
    epoch: u32,
    levels: &[Level],
) -> Result<(), LinearError> {
    let io = |source| LinearError::Io { verb: "write", path: file.to_path_buf(), source };
    if let Some(folder) = file.parent() {
        std::fs::create_dir_all(folder).map_err(io)?;
    }
    let mut tensors = vec![
        ("key".to_owned(), Tensor::from_slice(key.as_bytes())),
        ("epoch".to_owned(), Tensor::from_slice(&[i64::from(epoch)])),
    ];
    for level in levels {
        let name = |what: &str| format!("res{}.{what}", level.level);
        let heads = level.heads.tensors();
        tensors.extend(heads.map(|(what, tensor)| (name(what), tensor.shallow_clone())));
        let best = level.best.iter().flat_map(|(top1, at)| [*top1, f64::from(*at)]);
        tensors.push((name("best"), Tensor::from_slice(&best.collect::<Vec<f64>>())));
        tensors.push((name("losses"), Tensor::from_slice(&level.losses)));
    }
    let part = file.with_extension("part");
    Tensor::write_safetensors(&tensors, &part)?;
    let flush = |path: &Path| std::fs::File::open(path)?.sync_all();
    flush(&part).and_then(|()| std::fs::rename(&part, file)).map_err(io)?;
    file.parent().map_or(Ok(()), flush).map_err(io)
}

/// Goes on from a state of what `key` names: returns the finished epochs, 0 where there is no file.
pub(super) fn restore(file: &Path, key: &str, levels: &mut [Level]) -> Result<u32, LinearError> {
    if !file.try_exists().unwrap_or(true) {
        return Ok(0);
    }
    let other = || LinearError::State { path: file.to_path_buf() };
    let tensors: HashMap<String, Tensor> =
        Tensor::read_safetensors(file).map_err(|_| other())?.into_iter().collect();
    let get = |name: &str| tensors.get(name).ok_or_else(other);
    if Vec::<u8>::try_from(get("key")?)? != key.as_bytes() {
        return Err(other());
    }
    for level in levels {
        let name = |what: &str| format!("res{}.{what}", level.level);
        let names = level.heads.tensors().map(|(what, _)| name(what));
        let mut saved = Vec::new();
        for name in &names {
            saved.push(get(name)?.shallow_clone());
        }
        let saved: [Tensor; 6] = saved.try_into().map_err(|_| other())?;
        let best = Vec::<f64>::try_from(get(&name("best"))?)?;
        level.best = best.chunks_exact(2).map(|pair| (pair[0], pair[1] as u32)).collect();
        level.losses = Vec::<f64>::try_from(get(&name("losses"))?)?;
        level.heads.restore(&saved)?;
    }
    let epoch = Vec::<i64>::try_from(get("epoch")?)?;
    let epoch = epoch.first().and_then(|epoch| u32::try_from(*epoch).ok()).ok_or_else(other)?;
    note!("going on from {} after epoch {epoch}", file.display());
    Ok(epoch)
}
