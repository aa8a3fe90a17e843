//! Results of any number of inputs. Candle's operations have three at most.

use super::given::given;
use candle_core::{DType, Result, Tensor};
use std::sync::{Arc, Mutex, PoisonError};

/// Gradients on their way to the inputs that a stand-in stands for.
type OnTheWay = Arc<Mutex<Vec<Option<Tensor>>>>;

/// As [`given`] for two inputs or more, with one gradient for each. All but the first two are there by a tensor that
/// stands for them, and by which their gradients come to them.
pub(crate) fn given_many(
    name: &'static str,
    inputs: &[&Tensor],
    value: Tensor,
    backward: impl Fn(&Tensor) -> Result<Vec<Tensor>> + Send + Sync + 'static,
) -> Result<Tensor> {
    let [first, second, others @ ..] = inputs else {
        candle_core::bail!("{name}: fewer than two inputs")
    };
    let on_the_way = OnTheWay::default();
    let others = match others.is_empty() {
        true => first.detach(),
        false => stand_in(others, 0, &on_the_way)?,
    };
    let has_others = others.track_op();
    let one = others.detach();
    given(name, [first, second, &others], value, move |dy| {
        let mut all = backward(dy)?.into_iter();
        let own = [all.next(), all.next()];
        *on_the_way.lock().unwrap_or_else(PoisonError::into_inner) = all.map(Some).collect();
        let [first, second] = own;
        // Whatever it is: what counts is on the way.
        Ok([first, second, has_others.then(|| one.clone())])
    })
}

/// A tensor that stands for `inputs`, which have the gradients from `first` on.
fn stand_in(inputs: &[&Tensor], first: usize, on_the_way: &OnTheWay) -> Result<Tensor> {
    let value = Tensor::zeros(1, DType::F32, inputs[0].device())?;
    if inputs.len() <= 3 {
        let three = [0, 1, 2].map(|i| {
            inputs
                .get(i)
                .map_or_else(|| value.clone(), |t| (*t).clone())
        });
        let (count, on_the_way) = (inputs.len(), on_the_way.clone());
        let [a, b, c] = &three;
        return given("part of many", [a, b, c], value, move |_| {
            let mut all = on_the_way.lock().unwrap_or_else(PoisonError::into_inner);
            Ok([0, 1, 2].map(|i| match i < count {
                true => all.get_mut(first + i).and_then(Option::take),
                false => None,
            }))
        });
    }
    let part = inputs.len().div_ceil(3);
    let mut parts = Vec::new();
    for (i, inputs) in inputs.chunks(part).enumerate() {
        parts.push(stand_in(inputs, first + i * part, on_the_way)?);
    }
    parts.resize(3, value.clone());
    let ones = parts.iter().map(Tensor::detach).collect::<Vec<_>>();
    given(
        "many",
        [&parts[0], &parts[1], &parts[2]],
        value,
        move |_| Ok([0, 1, 2].map(|i| Some(ones[i].clone()))),
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::{Device, Var};

    /// `Σ i · input_i` of any number of inputs.
    #[test]
    fn any_number_of_inputs_have_gradients() {
        for count in [2usize, 3, 5, 6, 11, 20] {
            let value = |i: usize| Tensor::full(i as f32, (2, 3), &Device::Cpu).unwrap();
            let inputs: Vec<Var> = (0..count)
                .map(|i| Var::from_tensor(&value(i)).unwrap())
                .collect();
            // What does not train is among them.
            let still = inputs[count / 2].as_tensor().detach();
            let tensors: Vec<&Tensor> = (0..count)
                .map(|i| match i == count / 2 {
                    true => &still,
                    false => inputs[i].as_tensor(),
                })
                .collect();
            let backward = move |dy: &Tensor| (0..count).map(|i| dy * i as f64).collect();
            let sum = given_many("sum", &tensors, value(7), backward).unwrap();
            let grads = sum.sum_all().unwrap().backward().unwrap();
            for (i, input) in inputs.iter().enumerate().filter(|(i, _)| *i != count / 2) {
                let given = grads.get(input).unwrap().to_vec2::<f32>().unwrap();
                assert_eq!(given, vec![vec![i as f32; 3]; 2], "{i} of {count}");
            }
            assert!(grads.get(&inputs[count / 2]).is_none());
        }
    }
}
