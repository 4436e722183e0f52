//! `cargo xtask`.
mod objects;
fn main() -> anyhow::Result<()> {
    let t = std::time::Instant::now();
    objects::write_set(std::path::Path::new(&std::env::args().nth(1).unwrap_or_default()), 1, 150, 40)?;
    eprintln!("{:?}", t.elapsed());
    Ok(())
}
