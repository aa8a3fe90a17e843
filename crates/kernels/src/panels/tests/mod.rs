#[cfg(all(target_arch = "x86_64", target_os = "linux", target_env = "gnu"))]
mod tiles;

use super::*;
use crate::gemm::Output;
use half::bf16;

/// Numbers that 16 bits do not hold, of different sizes.
fn numbers(count: usize, seed: u32) -> Vec<f32> {
    let number = |i: u32| {
        let hash = (i + 77 * seed).wrapping_mul(0x9e37_79b1);
        let size = 1.0 + (hash >> 28) as f32;
        (hash as i32 as f32 / i32::MAX as f32) * size
    };
    (0..count as u32).map(number).collect()
}

fn units<W: Stored>() -> Vec<Unit> {
    let best = W::unit();
    if best.is_none() {
        let name = std::any::type_name::<W>();
        eprintln!("SKIPPED: this processor has no unit for {name}");
    }
    let mut units: Vec<Unit> = best
        .into_iter()
        .chain(best.map(|_| Unit::Vectors))
        .collect();
    units.dedup();
    units
}

fn run<'a, W: Stored>(
    unit: Unit,
    product: &Product<'a, '_, W>,
    scratch: &mut Scratch<'a>,
) -> Vec<f32> {
    let (rows, columns) = (product.rows, product.columns);
    let mut y = vec![f32::NAN; rows * columns + 1];
    let out = Output::new(&mut y).part(0, columns, [rows, columns]);
    // SAFETY: nobody else uses it.
    unsafe { W::run(unit, product, scratch, out) };
    assert!(y.pop().is_some_and(f32::is_nan), "written beyond the end");
    y
}

/// The numbers that matrices of a type hold, and those that rows become under them.
trait Tested: Stored {
    fn of(number: f32) -> Self;
    fn value(self) -> f64;
}

impl Tested for f32 {
    fn of(number: f32) -> Self {
        number
    }

    fn value(self) -> f64 {
        self.into()
    }
}

impl Tested for bf16 {
    fn of(number: f32) -> Self {
        Self::from_f32(number)
    }

    fn value(self) -> f64 {
        self.to_f64()
    }
}

fn products_of_every_shape<W: Tested>(units: &[Unit]) {
    for &unit in units {
        for (rows, inner, columns) in [
            (1, 1, 1),
            (1, 2048, 48),
            (3, 31, 15),
            (7, 33, 33),
            (8, 512, 32),
            (9, 513, 16),
            (16, 64, 40),
            (17, 1030, 17),
            (31, 96, 33),
            (32, 1100, 64),
            (33, 258, 70),
            (50, 40, 32),
        ] {
            for inputs in [Inputs::InRows, Inputs::InColumns] {
                let (width, high) = match inputs {
                    Inputs::InRows => (inner + 5, columns),
                    Inputs::InColumns => (columns + 5, inner),
                };
                let x = numbers(rows * (inner + 3), 1);
                let w: Vec<W> = numbers(width * high, 2).into_iter().map(W::of).collect();
                let product = Product {
                    rows,
                    inner,
                    columns,
                    x: (&x, inner + 3),
                    w: (&w, width),
                    inputs,
                };
                let mut scratch = Scratch::default();
                // What fewer of the rows left behind does not stand for all of them.
                let fewer = Product {
                    rows: rows.div_ceil(2),
                    ..product
                };
                let of_fewer = run(unit, &fewer, &mut scratch);
                let y = run(unit, &product, &mut scratch);
                assert_eq!(of_fewer, y[..fewer.rows * columns], "fewer");
                assert_eq!(run(unit, &product, &mut scratch), y, "again");
                for (i, &y) in y.iter().enumerate() {
                    let (row, column) = (i / columns, i % columns);
                    let (mut sum, mut size) = (0.0, 0.0);
                    for k in 0..inner {
                        let x = W::of(x[row * (inner + 3) + k]).value();
                        let w = w[match inputs {
                            Inputs::InRows => column * width + k,
                            Inputs::InColumns => k * width + column,
                        }];
                        sum += x * w.value();
                        size += (x * w.value()).abs();
                    }
                    assert!(
                        (f64::from(y) - sum).abs() <= 1e-5 * size,
                        "{y} for {sum} at {i} of {rows} x {inner} x {columns} by {unit:?}"
                    );
                }
                // The last row by itself has the bits that it has beside the others.
                let alone = Product {
                    rows: 1,
                    x: (&x[(rows - 1) * (inner + 3)..], inner + 3),
                    ..product
                };
                let alone = run(unit, &alone, &mut scratch);
                assert_eq!(alone, y[(rows - 1) * columns..], "{unit:?}");
            }
        }
    }
}

#[test]
fn matrices_in_f32() {
    products_of_every_shape::<f32>(&units::<f32>());
}

/// Which of them computes a row depends on what stands beside it.
#[test]
fn the_same_bits_as_of_few_rows() {
    use crate::few;
    let (rows, inner, columns) = (20, 1030, 40);
    let (x, w) = (numbers(rows * inner, 3), numbers(columns * inner, 4));
    let product = Product {
        rows,
        inner,
        columns,
        x: (&x, inner),
        w: (&w, inner),
        inputs: Inputs::InRows,
    };
    let shape = few::Shape {
        rows,
        inner,
        columns,
    };
    for unit in units::<f32>() {
        let mut y = vec![0.0; rows * columns];
        if few::product(shape, &x, &w, &mut y) {
            assert_eq!(run(unit, &product, &mut Scratch::default()), y);
        }
    }
}

#[test]
fn matrices_in_bf16() {
    products_of_every_shape::<bf16>(&units::<bf16>());
}

/// The instructions of the tile unit where there is none, one by one.
#[test]
#[cfg(all(target_arch = "x86_64", target_os = "linux", target_env = "gnu"))]
fn matrices_in_bf16_by_tiles() {
    match bf16::unit() {
        Some(Unit::Vectors) => {
            let _tiles = tiles::Unit::new();
            products_of_every_shape::<bf16>(&[Unit::Amx]);
        }
        Some(Unit::Amx) => {}
        None => eprintln!("SKIPPED: rows are rounded by vectors that this processor does not have"),
    }
}

#[test]
fn numbers_that_are_none_stay_so() {
    for unit in units::<bf16>() {
        let w = [bf16::ONE; 64];
        let product = |x: f32| {
            let x = [x, 1.0];
            let product = Product {
                rows: 1,
                inner: 2,
                columns: 1,
                x: (&x, 2),
                w: (&w, 2),
                inputs: Inputs::InRows,
            };
            run(unit, &product, &mut Scratch::default())[0]
        };
        assert!(product(f32::NAN).is_nan());
        assert_eq!(product(f32::INFINITY), f32::INFINITY);
    }
}
