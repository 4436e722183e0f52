//! Cross-entropy of logits with classes, and its gradient in closed form.

use tch::Tensor;

/// Mean cross-entropy of logits `[rows, classes]` with one class `[rows]` each: readings `[2]` (the loss; the
/// share of rows whose largest logit is that of their class), and the gradient by
/// the logits, times `share`: `(softmax - onehot) / rows`.
pub fn score(logits: &Tensor, classes: &Tensor, share: f64) -> (Tensor, Tensor) {
    tch::no_grad(|| {
        let (rows, kind) = (logits.size()[0], logits.kind());
        let log_p = logits.log_softmax(1, None);
        let own = classes.unsqueeze(1); // [rows, 1]
        let loss = -log_p.gather(1, &own, false).mean(None);
        let right = logits.argmax(1, false).eq_tensor(classes).to_kind(kind).mean(None);
        let target = logits.zeros_like().scatter_value(1, &own, 1.0);
        let gradient = (log_p.exp() - target) * (share / rows as f64);
        (Tensor::stack(&[loss, right], 0), gradient)
    })
}

#[cfg(test)]
mod tests {
    use tch::{Kind, Reduction};

    use super::*;
    use crate::draws::Draws;

    #[test]
    fn the_score_is_the_definition_and_its_gradient() {
        let logits = Draws::new(1, "logits", 0).normal(&[7, 4], 3.0).to_kind(Kind::Double);
        let leaf = logits.set_requires_grad(true);
        let classes = Tensor::from_slice(&[0_i64, 3, 1, 1, 2, 0, 3]);
        let defined =
            leaf.cross_entropy_loss(&classes, None::<&Tensor>, Reduction::Mean, -100, 0.0);
        (&defined * 0.25).backward();
        let (readings, gradient) = score(&leaf.detach(), &classes, 0.25);
        let number = |t: &Tensor| t.double_value(&[]);
        assert!((number(&readings.get(0)) - number(&defined)).abs() < 1e-12);
        assert!(number(&(gradient - leaf.grad()).abs().max()) < 1e-12);
        let right = (0..7).filter(|row| {
            let row = *row as i64;
            let of = |class: i64| leaf.double_value(&[row, class]);
            let own = of(classes.int64_value(&[row]));
            (0..4).all(|class| of(class) <= own)
        });
        assert!((number(&readings.get(1)) - right.count() as f64 / 7.0).abs() < 1e-12);
    }

    #[test]
    fn logits_that_say_nothing_lose_the_logarithm_of_the_classes() {
        let logits = Tensor::zeros([8, 4], (Kind::Double, tch::Device::Cpu));
        let classes = Tensor::zeros([8], (Kind::Int64, tch::Device::Cpu));
        let loss = score(&logits, &classes, 1.0).0.double_value(&[0]);
        assert!((loss - 4_f64.ln()).abs() < 1e-12, "{loss}");
    }
}
